import hashlib
import io
import json
import tarfile

import numpy as np
import pytest
from PIL import Image

from fewstep.errors import FewstepError, RequestError
from fewstep.training.emoji import load_sprites, prepare_emoji, subset
from fewstep.training.emoji import sprites as module
from fewstep.training.emoji.concepts import _data_file, code_key, load_concepts, select
from fewstep.training.emoji.fetch import PACKAGES, Package
from fewstep.training.emoji.sprites import look_of

CODES = _data_file("allow.json")
SVG = '<rect x="0" y="0" width="16" height="32" fill="#ff0000"/>'


def tarball(path, files: dict[str, bytes]) -> None:
    with tarfile.open(path, "w:gz") as archive:
        for name, data in files.items():
            info = tarfile.TarInfo(f"package/{name}")
            info.size = len(data)
            archive.addfile(info, io.BytesIO(data))


def half_red_webp() -> bytes:
    picture = np.zeros((256, 256, 4), np.uint8)
    picture[:, :128] = (255, 0, 0, 255)
    buffer = io.BytesIO()
    Image.fromarray(picture).save(buffer, "webp", lossless=True)
    return buffer.getvalue()


@pytest.fixture
def packages(tmp_path, monkeypatch):
    """Stand-ins for four packages: all names, but pictures of the first concept only."""
    folder = tmp_path / "packages"
    folder.mkdir()
    first = CODES[0]
    names = [
        {"hexcode": f"00{code.upper()}", "label": f"thing {i}", "tags": ["round"], "group": 7}
        for i, code in enumerate(CODES)
    ]
    icons = {"width": 32, "height": 32, "icons": {"thing": {"body": SVG}}}
    contents = {
        "names": {"en/data.json": json.dumps(names).encode()},
        "keywords": {"dist/emoji-en-US.json": json.dumps({"😀": ["a_smile"]}).encode()},
        "3d": {f"assets/{first}-fe0f.webp": half_red_webp(), "README.md": b""},
        "flat": {
            "icons.json": json.dumps(icons).encode(),
            "chars.json": json.dumps({first: "thing"}).encode(),
        },
    }
    for key, files in contents.items():
        path = folder / PACKAGES[key].file_name
        tarball(path, files)
        digest = hashlib.sha256(path.read_bytes()).hexdigest()
        package = Package(PACKAGES[key].name, PACKAGES[key].version, digest)
        monkeypatch.setitem(PACKAGES, key, package)
    return folder


def test_names_and_keywords_are_joined_by_code_point(packages):
    concepts = load_concepts(packages)
    assert len(concepts) == 1538
    assert (concepts[0].name, concepts[0].tags) == ("thing 0", ("round", "a smile"))


@pytest.mark.parametrize("style", ["3d", "flat"])
def test_prepared_picture_is_what_the_package_holds(packages, tmp_path, style):
    if style == "flat":
        pytest.importorskip("resvg_py")
    sprites = prepare_emoji(tmp_path / "out", packages, styles=[style], size=32, progress=False)
    picture = sprites.pictures[style][0]
    assert isinstance(sprites.pictures[style], np.memmap)
    assert (picture[:, 2:12] == (255, 0, 0, 255)).all()
    assert (picture[:, 20:, 3] == 0).all()
    assert sprites.has(style, 0)
    assert not sprites.has(style, 1)
    assert not sprites.pictures[style][1:].any()


def test_prepare_goes_on_with_the_styles_that_are_missing(packages, tmp_path, monkeypatch):
    pytest.importorskip("resvg_py")
    prepare_emoji(tmp_path / "out", packages, styles=["3d"], size=16, progress=False)
    rendered = []
    render_style = module.render_style

    def counted(style, *args, **kwargs):
        rendered.append(style)
        return render_style(style, *args, **kwargs)

    monkeypatch.setattr(module, "render_style", counted)
    both = prepare_emoji(tmp_path / "out", packages, styles=["3d", "flat"], size=16, progress=False)
    assert rendered == ["flat"]
    assert both.styles == ("3d", "flat")


def test_prepare_refuses_a_directory_with_other_concepts(packages, tmp_path):
    prepare_emoji(tmp_path / "out", packages, styles=["3d"], size=16, progress=False)
    with pytest.raises(RequestError, match="holds 1538 other concepts at 16 px"):
        prepare_emoji(tmp_path / "out", packages, styles=["3d"], size=32, progress=False)


def test_unknown_style_is_named(tmp_path):
    with pytest.raises(RequestError, match=r"styles=\['oil'\]"):
        prepare_emoji(tmp_path, styles=["oil"])


def test_selection_for_the_cpu_has_512_concrete_names(packages):
    rule = _data_file("objects512.json")
    assert len(set(rule["pick"])) == len(rule["pick"])
    assert not set(rule["pick"]) & set(rule["skip"])
    with pytest.raises(RequestError, match="selection='few'"):
        select("few", load_concepts(packages))


def test_code_points_of_all_packages_take_one_form():
    assert code_key("1F3CB-FE0F-200D-2640-FE0F") == "1f3cb-200d-2640"
    assert code_key("00a9-fe0f") == "a9"


def test_subset_is_read_like_any_other_directory(sprites, tmp_path):
    small = subset(sprites, tmp_path, names=["fox", "key"], styles=["3d"], size=32)
    assert [concept.name for concept in small.concepts] == ["fox", "key"]
    assert small.pictures["3d"].shape == (2, 32, 32, 4)
    assert small.looks["3d"] == [sprites.looks["3d"][i] for i in (1, 11)]
    assert "Microsoft" in (tmp_path / "NOTICE").read_text()


def test_subset_does_not_know_other_names(sprites, tmp_path):
    with pytest.raises(RequestError, match="'griffin'"):
        subset(sprites, tmp_path, names=["griffin"])


def test_directory_without_sprites_says_how_to_make_them(tmp_path):
    with pytest.raises(FewstepError, match="fewstep data emoji --output"):
        load_sprites(tmp_path)


def test_hue_is_known_only_where_one_hue_covers_the_picture():
    plain = np.full((32, 32, 4), (200, 30, 30, 255), np.uint8)
    assert look_of(plain).hue == pytest.approx(0, abs=2)
    halves = plain.copy()
    halves[:, :16, :3] = (30, 30, 200)
    assert look_of(halves).hue is None
    gray = np.full((32, 32, 4), (120, 120, 120, 255), np.uint8)
    assert look_of(gray).hue is None
    assert look_of(np.zeros((32, 32, 4), np.uint8)) is None
