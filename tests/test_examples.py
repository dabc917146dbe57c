"""Every example runs, and leaves the pictures that it speaks of."""

from __future__ import annotations

import runpy
from pathlib import Path

import pytest
from latentrt.export.embedded import ensure_bundle
from latentrt.runtime import Pipeline
from PIL import Image

EXAMPLES = Path(__file__).parent.parent / "examples"
PICTURES = {
    "text_to_image": ["text_to_image.png"],
    "image_to_image": ["image_to_image.png", "repainted.png"],
    "batch_prompts": [f"batch-{number}.png" for number in range(6)],
    "preview_callback": ["preview-00.png", "preview-05.png", "preview-10.png"],
    "serve_with_threads": ["a-red-circle.png", "a-yellow-star.png", "a-green-ring.png", "a-black-cross.png"],
}


def draw(name: str, bundle: Path, folder: Path) -> dict[str, Image.Image]:
    runpy.run_path(str(EXAMPLES / f"{name}.py"))["main"](bundle, folder)
    return {path.name: Image.open(path).convert("RGB") for path in folder.iterdir()}


@pytest.fixture(scope="module")
def bundle() -> Path:
    pytest.importorskip("onnxruntime")
    return ensure_bundle()


@pytest.fixture(scope="module")
def threads(bundle: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Image.Image]:
    return draw("serve_with_threads", bundle, tmp_path_factory.mktemp("threads"))


@pytest.mark.parametrize("name", PICTURES)
def test_examples_draw(name: str, bundle: Path, threads: dict[str, Image.Image], tmp_path: Path) -> None:
    drawn = threads if name == "serve_with_threads" else draw(name, bundle, tmp_path)
    assert sorted(drawn) == sorted(PICTURES[name])
    assert all(low < high for picture in drawn.values() for low, high in [picture.convert("L").getextrema()])


def test_threads_get_their_own_pictures(bundle: Path, threads: dict[str, Image.Image]) -> None:
    with Pipeline.open(bundle) as pipe:
        for name, picture in threads.items():
            prompt = name.removesuffix(".png").replace("-", " ")
            assert pipe(prompt, num_inference_steps=10, seed=1).images[0].tobytes() == picture.tobytes(), prompt


def test_every_example_is_short_and_run() -> None:
    found = {path.stem: path.read_text(encoding="utf-8") for path in EXAMPLES.glob("*.py")}
    assert set(found) == set(PICTURES)
    assert {name: len(text.splitlines()) for name, text in found.items() if len(text.splitlines()) >= 40} == {}
