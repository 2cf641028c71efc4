import numpy as np
import torch

from microdit.trainer.data.randomness import Draw, Noise


def test_draws_depend_on_seed_step_and_row_alone() -> None:
    rows = np.arange(8)
    a, b = Draw.of(1, 5, 8, rows), Draw.of(1, 5, 8, np.array([6, 3]))
    assert torch.equal(a.sigma_normal[[6, 3]], b.sigma_normal) and np.array_equal(a.caption[[6, 3]], b.caption)
    assert not np.array_equal(a.caption, a.dropout)
    for other in (Draw.of(1, 6, 8, rows), Draw.of(2, 5, 8, rows)):
        assert not torch.equal(a.sigma_normal, other.sigma_normal)
        assert not np.array_equal(a.caption, other.caption)


def test_noise_depends_on_seed_step_and_row_alone() -> None:
    rows = np.arange(512)
    a, b = Noise.of(1, 5, rows, (4, 2, 2), 4), Noise.of(1, 5, np.array([6, 300]), (4, 2, 2), None)
    assert torch.equal(a.noise[[6, 300]], b.noise) and b.permutation is None
    assert a.permutation is not None and a.permutation.sort(dim=1).values.tolist() == [[0, 1, 2, 3]] * len(rows)
    assert len({tuple(row) for row in a.noise.flatten(1).tolist()}) == len(rows)
    assert abs(a.noise.mean()) < 0.05 and abs(a.noise.std() - 1) < 0.05  # 8,192 numbers: four standard errors
    assert abs(np.corrcoef(a.noise.flatten(1)[:-1].ravel(), a.noise.flatten(1)[1:].ravel())[0, 1]) < 0.05
    for other in (Noise.of(1, 6, rows, (4, 2, 2), 4), Noise.of(2, 5, rows, (4, 2, 2), 4)):
        assert not torch.equal(a.noise, other.noise)
