from __future__ import annotations

import tracemalloc
from pathlib import Path

import numpy as np
import pytest
from latentrt.benchmarks.quality import scores as quality
from latentrt.benchmarks.quality.fidelity import compare_pictures, fidelity
from latentrt.engines.errors import CheckpointError, RequestError
from latentrt.export.compare import haarpsi, max_difference, psnr, relative_error, ssim
from latentrt.runtime import cli


def test_relative_error_and_psnr_by_hand() -> None:
    assert relative_error(np.array([3.0, 5.0]), np.array([3.0, 4.0])) == pytest.approx(1 / 5)
    a, b = np.full((2, 2, 3), 10, np.uint8), np.full((2, 2, 3), 13, np.uint8)
    assert psnr(a, b) == pytest.approx(20 * np.log10(255 / 3))
    assert psnr(a, a) is None


def test_many_pictures_are_compared_one_at_a_time() -> None:
    many = np.full((64, 64, 64, 3), 100, np.uint8)
    other = many + np.arange(64, dtype=np.uint8)[:, None, None, None]
    tracemalloc.start()
    try:
        assert psnr(other, many) == pytest.approx(10 * np.log10(255**2 / np.mean(np.arange(64.0) ** 2)))
        assert max_difference(other, many) == 63
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert peak < many.size  # of 8 bytes each all of them in float64 are


def test_ssim_is_one_for_equal_pictures_and_known_for_flat_ones() -> None:
    rng = np.random.default_rng(0)
    picture = rng.integers(0, 256, (32, 32, 3), np.uint8)
    assert ssim(picture, picture) == pytest.approx(1)
    a, b = np.full((16, 16, 3), 100, np.uint8), np.full((16, 16, 3), 110, np.uint8)
    c1 = (0.01 * 255) ** 2  # flat pictures have no contrast: only the luminance term is left
    assert ssim(a, b) == pytest.approx((2 * 100 * 110 + c1) / (100**2 + 110**2 + c1), rel=1e-6)


def test_ssim_falls_with_noise() -> None:
    rng = np.random.default_rng(0)
    picture = np.tile(np.arange(0, 256, 4, np.uint8)[:, None, None], (1, 64, 3))
    noisy = [np.clip(picture + rng.normal(0, s, picture.shape), 0, 255).astype(np.uint8) for s in (2, 20)]
    assert 1 > ssim(noisy[0], picture) > ssim(noisy[1], picture) > 0


def _disk(across: int, color: tuple[int, int, int]) -> np.ndarray:
    y, x = np.mgrid[:64, :64]
    picture = np.full((64, 64, 3), 248, np.uint8)
    picture[np.hypot(x - across, y - 32) < 15] = color
    return picture


@pytest.mark.parametrize(
    ("across", "color", "expected"),  # piq 0.8.0's haarpsi, whose YIQ has one more digit
    [(35, (214, 34, 40), 0.49784), (32, (36, 66, 212), 0.98931), (32, (224, 54, 60), 0.99802)],
)
def test_haarpsi_is_that_of_piq(across: int, color: tuple[int, int, int], expected: float) -> None:
    disk = _disk(32, (214, 34, 40))
    found = haarpsi(_disk(across, color), disk)
    assert found == pytest.approx(expected, abs=2e-4)
    assert haarpsi(disk, _disk(across, color)) == pytest.approx(found)


def test_haarpsi_of_equal_pictures_is_one() -> None:
    for picture in (_disk(32, (214, 34, 40)), np.zeros((16, 17, 3), np.uint8)):
        assert haarpsi(picture, picture) == pytest.approx(1)


def test_fidelity_of_saved_answers(tmp_path: Path) -> None:
    images = np.zeros((1, 16, 16, 3), np.uint8)
    np.savez(tmp_path / "a.npz", latents=np.ones((1, 4, 2, 2)), images=images)
    images[0, 3, 4, 1] = 7
    np.savez(tmp_path / "b.npz", latents=np.full((1, 4, 2, 2), 1.1), images=images)
    found = fidelity(tmp_path / "b.npz", tmp_path / "a.npz")
    assert found.latents_relative_error == pytest.approx(0.1)
    assert found.max_pixel_difference == 7
    assert found.ssim < 1 and found.haarpsi < 1


def test_pictures_are_judged_together_and_the_worst_alone() -> None:
    reference = np.full((2, 16, 16, 3), 100, np.uint8)
    pictures = reference + np.array([0, 4], np.uint8).reshape(2, 1, 1, 1)
    found = compare_pictures(pictures, reference)
    assert (found.pictures, found.max_pixel_difference) == (2, 4)
    assert found.psnr == pytest.approx(20 * np.log10(255 / 4) + 10 * np.log10(2))  # half the mean squared error
    assert found.least_psnr == pytest.approx(20 * np.log10(255 / 4))
    assert found.ssim == pytest.approx((1 + ssim(pictures[1], reference[1])) / 2)
    equal = compare_pictures(reference, reference)
    assert equal.psnr is None and equal.least_psnr is None


def test_fid_by_hand() -> None:
    mean, covariance = np.array([1.0, 2.0]), np.diag([4 / 3, 16 / 3])
    assert quality.fid_of_moments(mean, covariance, mean, covariance) == pytest.approx(0, abs=1e-9)
    assert quality.fid_of_moments(mean + 3, covariance, mean, covariance) == pytest.approx(18)
    # covariances C and 4C of the same mean: tr(C + 4C − 2·2C) = tr C
    assert quality.fid_of_moments(mean, 4 * covariance, mean, covariance) == pytest.approx(20 / 3)


def test_fid_of_covariances_that_do_not_commute() -> None:
    a, b = np.array([[2.0, 1.0], [1.0, 2.0]]), np.array([[3.0, 0.0], [0.0, 1.0]])
    # tr (AB)^½ of 2×2: √(tr AB + 2 √det AB)
    root = np.sqrt(np.trace(a @ b) + 2 * np.sqrt(np.linalg.det(a @ b)))
    zero = np.zeros(2)
    assert quality.fid_of_moments(zero, a, zero, b) == pytest.approx(4 + 4 - 2 * root)


def test_inception_score_between_its_bounds() -> None:
    sure = 1e3 * np.eye(4)
    assert quality.inception_score(sure, splits=1)[0] == pytest.approx(4)  # sure, and every class once
    assert quality.inception_score(np.zeros((6, 4)), splits=2) == pytest.approx((1, 0))  # never sure
    assert quality.inception_score(np.tile(sure[:1], (6, 1)), splits=1)[0] == pytest.approx(1)  # always the same class


def test_clip_and_pick_scores_by_hand() -> None:
    images = np.array([[1.0, 0.0], [3.0, 4.0], [1.0, 0.0]])
    texts = np.array([[2.0, 0.0], [1.0, 0.0], [-1.0, 0.0]])  # cosines 1, 0.6, −1
    assert quality.clip_scores(images, texts) == pytest.approx([100, 60, 0])
    assert quality.pick_scores(images, texts, scale=10) == pytest.approx([10, 6, -10])


def test_scores_use_what_is_given() -> None:
    def inception(pictures: quality.Pictures) -> tuple[quality.Floats, quality.Floats]:
        return np.array([[0.0], [2.0]]), np.zeros((2, 3))

    pictures = [np.zeros((4, 4, 3), np.uint8)] * 2
    found = quality.scores(pictures, ["a", "b"], inception=inception, reference=(np.array([0.0]), np.array([[2.0]])))
    assert found == pytest.approx({"inception_score": 1, "inception_score_std": 0, "fid": 1})


def test_mlperf_bounds_judge_only_what_was_scored() -> None:
    assert quality.bounds({"fid": 23.5, "pick_score": 1.0}) == {"fid": True}
    assert quality.bounds({"fid": 22.9, "clip_score": 31.9}) == {"fid": False, "clip_score": False}


def test_statistics_file_is_read_or_refused(tmp_path: Path) -> None:
    np.savez(tmp_path / "s.npz", mu=np.zeros(2), sigma=np.eye(2))
    assert quality.moments(tmp_path / "s.npz")[1].tolist() == [[1, 0], [0, 1]]
    (tmp_path / "t.npz").write_bytes(b"no zip")
    with pytest.raises(RequestError, match="with mu and sigma"):
        quality.moments(tmp_path / "t.npz")


def test_quality_command_scores_pictures_with_local_weights(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    class Clip:
        scale = 2.0

        def __init__(self, folder: Path) -> None:
            assert folder == tmp_path

        def __call__(self, pictures: quality.Pictures, prompts: list[str]) -> tuple[quality.Floats, quality.Floats]:
            assert len(pictures) == len(prompts) == 2
            return np.array([[1.0, 0.0], [0.6, 0.8]]), np.array([[1.0, 0.0], [1.0, 0.0]])

    monkeypatch.setattr(quality, "ClipFeatures", Clip)
    monkeypatch.setattr(quality, "draw", lambda bundle, prompts, steps, seed: [np.zeros((8, 8, 3), np.uint8)] * 2)
    (tmp_path / "prompts").write_text("a\nb\n")
    arguments = ["bench", "quality", "bundle", "--prompts", str(tmp_path / "prompts")]
    assert cli.run([*arguments, "--clip", str(tmp_path), "--pickscore", str(tmp_path)]) == 0
    out = capsys.readouterr().out.split()
    assert out == ["clip_score", "80.0000", "MLPerf", "SDXL:", "outside", "the", "bounds", "pick_score", "1.6000"]
    assert cli.run(arguments) == 2


def test_clip_folder_that_is_none_is_refused(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="holds no CLIP model"):
        quality.ClipFeatures(tmp_path)


def test_clip_features_of_a_local_folder(clip_folder: Path) -> None:
    clip = quality.ClipFeatures(clip_folder)
    rng = np.random.default_rng(0)
    pictures = [rng.integers(0, 256, (40, 32, 3), np.uint8) for _ in range(3)]
    images, texts = clip(pictures, ["a circle", "a star", "a circle"], batch=2)
    assert images.shape == texts.shape == (3, 8)
    assert np.linalg.norm(images, axis=1) == pytest.approx(1, abs=1e-5)
    assert texts[0] == pytest.approx(texts[2], abs=1e-6)
    assert not np.allclose(texts[0], texts[1])
    assert clip.scale == pytest.approx(np.exp(2.6592), rel=1e-4)  # the initial logit scale of CLIP
    found = quality.scores(pictures, ["a circle", "a star", "a circle"], clip=clip, pick=clip)
    assert found["pick_score"] == pytest.approx(clip.scale * quality.cosine(images, texts).mean(), rel=1e-5)
