from __future__ import annotations

from pathlib import Path

import numpy as np
import PIL.Image
import pytest
import torch

from fewstep import RequestError
from fewstep.utils import export_to_gif, load_image, make_image_grid, numpy_to_pil, pt_to_pil


def test_load_image_is_upright_and_rgb(tmp_path: Path) -> None:
    picture = PIL.Image.new("RGB", (20, 10), "red")
    exif = picture.getexif()
    exif[0x0112] = 6  # lies on its side
    picture.save(tmp_path / "a.jpg", exif=exif)
    loaded = load_image(str(tmp_path / "a.jpg"))
    assert loaded.size == (10, 20) and loaded.mode == "RGB"
    assert load_image(PIL.Image.new("RGBA", (4, 4))).mode == "RGB"
    assert load_image(tmp_path / "a.jpg", lambda image: image.convert("L")).mode == "L"


def test_load_image_fetches_urls(tmp_path: Path) -> None:
    import functools
    import http.server
    import threading

    PIL.Image.new("RGB", (3, 5)).save(tmp_path / "a.png")

    class Quiet(http.server.SimpleHTTPRequestHandler):
        def log_message(self, *_: object) -> None: ...

    handler = functools.partial(Quiet, directory=str(tmp_path))
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        try:
            assert load_image(f"http://127.0.0.1:{server.server_port}/a.png").size == (3, 5)
        finally:
            server.shutdown()
            thread.join()


@pytest.mark.parametrize("image", ["no/such/file.png", "ftp://a/b.png", 7])
def test_load_image_says_what_it_takes(image: object) -> None:
    with pytest.raises(RequestError, match=r"must be a URL .* a file or a PIL picture, got"):
        load_image(image)  # type: ignore[arg-type]


def test_a_grid_is_filled_row_by_row() -> None:
    colours = ["red", "green", "blue", "white", "black", "teal"]
    cells = [PIL.Image.new("RGB", (4, 2), colour) for colour in colours]
    grid = make_image_grid(cells, rows=2, cols=3)
    assert grid.size == (12, 4)
    assert grid.getpixel((9, 0)) == cells[2].getpixel((0, 0))
    assert grid.getpixel((1, 3)) == cells[3].getpixel((0, 0))
    assert make_image_grid(cells, rows=3, cols=2, resize=8).size == (16, 24)
    with pytest.raises(RequestError, match=r"rows \* cols = 4 pictures, got 6"):
        make_image_grid(cells, rows=2, cols=2)


def test_a_gif_holds_the_frames(tmp_path: Path) -> None:
    frames = [PIL.Image.new("RGB", (8, 8), colour) for colour in ("red", "green", "blue")]
    path = export_to_gif(frames, tmp_path / "a.gif", fps=8)
    with PIL.Image.open(path) as gif:
        assert (gif.n_frames, gif.info["duration"], gif.info["loop"]) == (3, 120, 0)
    temporary = Path(export_to_gif(frames))
    assert temporary.suffix == ".gif" and temporary.stat().st_size > 0
    temporary.unlink()
    with pytest.raises(RequestError, match="at least one frame"):
        export_to_gif([])
    with pytest.raises(RequestError, match="fps must be positive, got 0"):
        export_to_gif(frames, fps=0)


def test_arrays_and_tensors_become_pictures() -> None:
    array = np.linspace(0, 1, 2 * 4 * 4 * 3, dtype=np.float32).reshape(2, 4, 4, 3)
    tensor = torch.from_numpy(array).permute(0, 3, 1, 2) * 2 - 1
    for a, b in zip(numpy_to_pil(array), pt_to_pil(tensor), strict=True):
        assert np.abs(np.asarray(a, dtype=int) - np.asarray(b, dtype=int)).max() <= 1
    assert numpy_to_pil(np.zeros((4, 4, 1)))[0].mode == "L"
