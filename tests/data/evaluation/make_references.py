"""Make `references.npz`: what the public tools say of the features and pictures here.

Run by hand, in an environment of its own:

    python -m venv tools && tools/bin/pip install torch torchvision torch-fidelity==0.4.0 clean-fid==0.1.35 \
        pytorch-fid==0.3.0 prdc==0.2
    tools/bin/python tests/data/evaluation/make_references.py [FOLDER OF PICTURES, default: pictures]
"""

import sys
import tempfile
from pathlib import Path

import numpy as np
import torch
from cleanfid import fid as clean
from cleanfid.resize import build_resizer
from PIL import Image
from prdc import compute_prdc
from pytorch_fid import inception as pytorch_inception
from pytorch_fid.fid_score import calculate_frechet_distance
from random_weights import random_weights
from torch_fidelity import metric_fid, metric_kid
from torch_fidelity.defaults import DEFAULTS
from torch_fidelity.feature_extractor_inceptionv3 import FeatureExtractorInceptionV3
from torchvision.transforms.functional import to_tensor

HERE = Path(__file__).parent
EVERY = 8  # of the 2,048 features so many are kept


def cores() -> dict[str, np.ndarray]:
    """What the tools compute from two sets of features."""
    random = np.random.default_rng(1)
    mixing = random.standard_normal((24, 24))
    first = (random.standard_normal((1050, 24)) @ mixing).astype(np.float32)
    second = (random.standard_normal((1100, 24)) @ mixing * 0.9 + 0.3).astype(np.float32)
    statistics = [metric_fid.fid_features_to_statistics(torch.from_numpy(each)) for each in (first, second)]
    kid = metric_kid.kid_features_to_metric(
        torch.from_numpy(first), torch.from_numpy(second), **{**DEFAULTS, "verbose": False}
    )
    moments = [(each.astype(np.float64).mean(0), np.cov(each, rowvar=False)) for each in (first, second)]
    prdc = compute_prdc(real_features=second, fake_features=first, nearest_k=5)
    whole = [each[:1000].astype(np.float64) for each in (first, second)]  # in float32 its sums are rounded
    return {
        "first": first,
        "second": second,
        "fid_torch_fidelity": np.array(
            metric_fid.fid_statistics_to_metric(*statistics, False)[metric_fid.KEY_METRIC_FID]
        ),
        "fid_pytorch_fid": np.array(calculate_frechet_distance(*moments[0], *moments[1])),
        "fid_clean_fid": np.array(clean.frechet_distance(*moments[0], *moments[1])),
        "kid_torch_fidelity": np.array(kid[metric_kid.KEY_METRIC_KID_MEAN]),
        "kid_clean_fid": np.array(clean.kernel_distance(*whole, num_subsets=1, max_subset_size=1000)),
        **{f"prdc_{name}": np.array(value) for name, value in prdc.items()},
    }


def network() -> torch.nn.Module:
    """pytorch-fid's network with random weights, with neither its resizing nor its scaling."""
    shapes = pytorch_inception._inception_v3(num_classes=1008, aux_logits=False, weights=None)
    shapes.Mixed_5b = pytorch_inception.FIDInceptionA(192, pool_features=32)
    pytorch_inception.load_state_dict_from_url = lambda *_, **__: random_weights(shapes.state_dict())
    return pytorch_inception.InceptionV3([3], resize_input=False, normalize_input=False).eval()


def pictures(folder: Path) -> dict[str, np.ndarray]:
    """The features of the pictures by each tool."""
    net = network()
    weights = random_weights(net_state(net))
    with tempfile.NamedTemporaryFile(suffix=".pth") as file:
        torch.save(weights, file.name)
        fidelity = FeatureExtractorInceptionV3(
            "inception-v3-compat", ["2048"], feature_extractor_weights_path=file.name
        )
    resized = pytorch_inception.InceptionV3([3], resize_input=True, normalize_input=True).eval()
    clean_size = build_resizer("clean")
    rows: dict[str, list[np.ndarray]] = {"clean-fid": [], "pytorch-fid": [], "torch-fidelity": []}
    with torch.inference_mode():
        for path in sorted(folder.iterdir()):
            image = Image.open(path).convert("RGB")
            array = torch.from_numpy(clean_size(np.asarray(image))).permute(2, 0, 1)[None]
            rows["clean-fid"].append(net((array - 128) / 128)[0].reshape(-1).numpy())
            rows["pytorch-fid"].append(resized(to_tensor(image)[None])[0].reshape(-1).numpy())
            pixels = torch.from_numpy(np.array(image)).permute(2, 0, 1)[None]
            rows["torch-fidelity"].append(fidelity(pixels)[0].reshape(-1).numpy())
    return {f"features_{name}": np.stack(values) for name, values in rows.items()}


def net_state(net: torch.nn.Module) -> dict[str, torch.Tensor]:
    shapes = pytorch_inception._inception_v3(num_classes=1008, aux_logits=False, weights=None)
    return dict(shapes.state_dict())


if __name__ == "__main__":
    if len(sys.argv) > 1:  # many pictures: all features, to be compared by hand
        np.savez(sys.argv[2], **pictures(Path(sys.argv[1])))
    else:
        kept = {name: values[:, ::EVERY] for name, values in pictures(HERE / "pictures").items()}
        np.savez_compressed(HERE / "references.npz", **cores(), **kept)
