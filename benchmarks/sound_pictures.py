"""Sound pictures of sorts in which colours jump at blocks of pixels: what a check for damage may take for damage."""

import random
from collections.abc import Callable

import numpy as np
from PIL import Image, ImageDraw, ImageEnhance, ImageFilter, ImageFont, ImageOps

Photographs = Callable[[random.Random], Image.Image]
WORDS = ["the", "quick", "brown", "fox", "jumps", "over", "LOREM", "IPSUM", "1234", "dolor", "sit", "amet"]
GRIDS = (1, 8, 16)


def colour(rng: random.Random) -> tuple[int, int, int]:
    return rng.randrange(256), rng.randrange(256), rng.randrange(256)


def blank(rng: random.Random, grid: int = 1) -> Image.Image:
    width, height = (rng.randrange(160, 800) // grid * grid for _ in range(2))
    return Image.new("RGB", (width, height), colour(rng))


def text(rng: random.Random, photo: Photographs) -> Image.Image:
    image = blank(rng)
    draw, size = ImageDraw.Draw(image), rng.choice([8, 10, 12, 16, 24, 48])
    font, ink, y = ImageFont.load_default(size), rng.choice([(0, 0, 0), colour(rng)]), rng.randrange(size)
    while y < image.height:
        line = " ".join(rng.choice(WORDS) for _ in range(60))[: rng.randrange(10, 400)]
        draw.text((rng.choice([2, 8, 16]), y), line, ink, font)
        y += rng.choice([size, size + 2, 16, 24])
    return image


def tiles(rng: random.Random, photo: Photographs) -> Image.Image:
    """Ground of tiles that rises and falls by one, as in a game; some with noise."""
    grid = rng.choice([8, 16, 32])
    image = blank(rng, grid)
    draw, top, ground = ImageDraw.Draw(image), rng.randrange(2, image.height // grid), colour(rng)
    for x in range(0, image.width, grid):
        if rng.random() < rng.choice([0.02, 0.1, 0.5]):
            top = min(image.height // grid - 1, max(1, top + rng.choice([-1, 1])))
        draw.rectangle((x, top * grid, x + grid - 1, image.height), fill=ground)
    return image if rng.random() < 0.5 else noisy(image, rng, rng.choice([3, 10, 25]))


def noisy(image: Image.Image, rng: random.Random, most: int) -> Image.Image:
    noise = np.random.default_rng(rng.getrandbits(32)).integers(-most, most + 1, (image.height, image.width, 1))
    return Image.fromarray((np.asarray(image) + noise).clip(0, 255).astype(np.uint8))


def stepped(image: Image.Image, rng: random.Random, strength: float) -> Image.Image:
    """Lay a colour on all that follows the corner of a block in reading order, as a wrong mean of a JPEG does."""
    pixels, grid = np.asarray(image).astype(float), rng.choice([8, 16])
    row, column = rng.randrange(1, image.height // grid - 1) * grid, rng.randrange(1, image.width // grid) * grid
    covered = np.zeros(pixels.shape[:2], bool)
    covered[row:, column:] = covered[row + grid :] = True
    pixels[covered] = pixels[covered] * (1 - strength) + np.array(colour(rng)) * strength
    return Image.fromarray(pixels.clip(0, 255).astype(np.uint8))


def step(rng: random.Random, photo: Photographs) -> Image.Image:
    image = stepped(blank(rng), rng, 1)
    return image if rng.random() < 0.5 else noisy(image, rng, 20)


def layer(rng: random.Random, photo: Photographs) -> Image.Image:
    return stepped(photo(rng), rng, rng.choice([0.1, 0.2, 0.4, 0.7, 1]))


def poster(rng: random.Random, photo: Photographs) -> Image.Image:
    grid = rng.choice(GRIDS)
    image = blank(rng)
    draw = ImageDraw.Draw(image)
    for _ in range(rng.randrange(2, 40)):
        (x, right), (y, bottom) = (
            sorted(rng.randrange(side) // grid * grid for _ in range(2)) for side in (image.width, image.height)
        )
        draw_form = rng.choice([draw.rectangle, draw.ellipse, draw.rectangle])
        draw_form((x, y, max(x, right - 1), max(y, bottom - 1)), fill=colour(rng))
    return image


def stripes(rng: random.Random, photo: Photographs) -> Image.Image:
    image = blank(rng)
    draw, grid, y = ImageDraw.Draw(image), rng.choice([4, 7, 8, 13, 16, 24]), 0
    while y < image.height:
        draw.rectangle((0, y, image.width, image.height), fill=colour(rng))
        y += grid * rng.randrange(1, 4)
    angle = rng.choice([0, 0, 90, 0.5, 1, 2, 3, -1, 45])
    return image.rotate(angle, resample=Image.Resampling.BICUBIC)


def gradient(rng: random.Random, photo: Photographs) -> Image.Image:
    few = np.random.default_rng(rng.getrandbits(32)).integers(0, 256, (rng.choice([2, 3, 5]), 2, 3), dtype=np.uint8)
    image = Image.fromarray(few).resize(blank(rng).size, Image.Resampling.BICUBIC)
    return image if rng.random() < 0.6 else ImageOps.posterize(image, rng.choice([2, 3, 4]))


def noise(rng: random.Random, photo: Photographs) -> Image.Image:
    image, grain = blank(rng), rng.choice([1, 2, 4, 8, 16])
    values = np.random.default_rng(rng.getrandbits(32)).integers(
        0, 256, (-(-image.height // grain), -(-image.width // grain), 3), dtype=np.uint8
    )
    return Image.fromarray(values).resize(image.size, rng.choice([Image.Resampling.NEAREST, Image.Resampling.BICUBIC]))


def letterbox(rng: random.Random, photo: Photographs) -> Image.Image:
    band = rng.choice([8, 16, 24, 32, rng.randrange(4, 70)])
    return ImageOps.expand(photo(rng), (0, band, 0, band), rng.choice([(0, 0, 0), (255, 255, 255), colour(rng)]))


def collage(rng: random.Random, photo: Photographs) -> Image.Image:
    """Put photographs and flat colours beside each other, on the grid of the blocks or not."""
    grid = rng.choice([1, 8, 16, 64])
    image = blank(rng, grid)
    for _ in range(rng.randrange(2, 9)):
        width, height = (max(grid, rng.randrange(60, side + 60) // grid * grid) for side in image.size)
        size = width, height
        part = photo(rng).resize(size) if rng.random() < 0.7 else Image.new("RGB", size, colour(rng))
        x, y = (rng.randrange(side) // grid * grid for side in image.size)
        image.paste(part, (x, y))
    return image


def banner(rng: random.Random, photo: Photographs) -> Image.Image:
    """Make a photograph with see-through rectangles."""
    image, grid = photo(rng).convert("RGBA"), rng.choice(GRIDS)
    for _ in range(rng.randrange(1, 4)):
        over = Image.new("RGBA", image.size)
        x, y = (rng.randrange(side) // grid * grid for side in image.size)
        right, bottom = rng.choice([image.width, x + grid * 20]), rng.choice([image.height, y + grid * 12])
        fill = (*colour(rng), rng.choice([25, 50, 100, 180, 255]))
        ImageDraw.Draw(over).rectangle((rng.choice([0, x]), y, right - 1, bottom - 1), fill=fill)
        image.alpha_composite(over)
    return image.convert("RGB")


def screen(rng: random.Random, photo: Photographs) -> Image.Image:
    """Draw windows with titles and lines of text."""
    image, font = blank(rng, 8), ImageFont.load_default(12)
    draw = ImageDraw.Draw(image)
    for _ in range(rng.randrange(4, 20)):
        x, y = (rng.randrange(side) // 8 * 8 for side in image.size)
        right, bottom = x + rng.randrange(4, 80) * 8, y + rng.randrange(2, 50) * 8
        draw.rectangle((x, y, right, bottom), fill=colour(rng), outline=colour(rng))
        draw.rectangle((x, y, right, y + 24), fill=colour(rng))
        for line in range(y + 28, min(bottom - 12, image.height), 16):
            draw.text((x + 4, line), "Some text of a line in a window " * 3, "black", font)
    return image


def pixels(rng: random.Random, photo: Photographs) -> Image.Image:
    """Draw a photograph as large squares of one colour each."""
    grid, image = rng.choice([4, 8, 16]), photo(rng)
    small = image.resize((max(20, image.width // grid), max(20, image.height // grid)), Image.Resampling.BOX)
    return small.resize((small.width * grid, small.height * grid), Image.Resampling.NEAREST)


def changed(rng: random.Random, photo: Photographs) -> Image.Image:
    """Make a dark, light, blurred or quantised photograph."""
    image = photo(rng)
    way = rng.randrange(4)
    if way == 0:
        return ImageEnhance.Brightness(image).enhance(rng.choice([0.05, 0.1, 0.4]))
    if way == 1:
        return ImageEnhance.Contrast(ImageEnhance.Brightness(image).enhance(2)).enhance(rng.choice([1, 2, 4]))
    if way == 2:
        return image.filter(ImageFilter.GaussianBlur(rng.choice([2, 5, 15])))
    return image.quantize(rng.choice([4, 8, 16, 64])).convert("RGB")


def plain(rng: random.Random, photo: Photographs) -> Image.Image:
    return photo(rng)


SORTS = [plain, text, tiles, step, layer, poster, stripes, gradient, noise, letterbox, collage, banner, screen, pixels]
SORTS += [changed, plain]
