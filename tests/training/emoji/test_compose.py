import colorsys

import numpy as np
import pytest

from fewstep.errors import RequestError
from fewstep.training.emoji import (
    HeldOut,
    Mix,
    SceneSampler,
    caption_corpus,
    keyword_phrases,
    render,
)
from fewstep.training.emoji.english import NUMBERS
from fewstep.training.emoji.scenes import BACKGROUNDS, POSITIONS, RECOLOURS

STYLES = (("3d", 0.5), ("flat", 0.3), ("noto", 0.2))


@pytest.fixture(scope="module")
def sampler(sprites):
    mix = Mix(single=0.4, placed=0.2, pair=0.2, count=0.2, styles=STYLES, recoloured=0.4)
    return SceneSampler(sprites, seed=3, mix=mix)


@pytest.fixture(scope="module")
def scenes(sampler):
    return [sampler.scene(index) for index in range(5000)]


def test_scene_depends_on_seed_and_index_alone(sprites, sampler, scenes):
    again = SceneSampler(sprites, seed=3, mix=sampler.mix)
    assert [again.scene(i) for i in (7, 0, 4999)] == [scenes[i] for i in (7, 0, 4999)]
    other = SceneSampler(sprites, seed=4, mix=sampler.mix)
    assert [other.scene(i) for i in range(20)] != scenes[:20]


def test_held_out_combinations_never_occur_in_training(sprites, scenes):
    codes = [concept.code for concept in sprites.concepts]
    for scene in scenes:
        shown = [codes[placed.concept] for placed in scene.objects]
        assert not any(HeldOut.background(code, scene.background) for code in shown)
        assert not (scene.kind == "pair" and HeldOut.pair(*shown))
        for placed in scene.objects:
            recolour = placed.recolour
            assert recolour is None or not HeldOut.recolour(codes[placed.concept], recolour)


@pytest.mark.parametrize("kind", ["background", "pair", "recolour"])
def test_held_out_scenes_hold_a_held_out_combination(sprites, sampler, kind):
    asked = sampler.held_out_scenes(kind, 5)
    assert 0 < len(asked) == len({scene.caption for scene in asked})
    assert asked == sampler.held_out_scenes(kind, 5)
    for scene in asked:
        codes = [sprites.concepts[placed.concept].code for placed in scene.objects]
        if kind == "pair":
            assert HeldOut.pair(*codes)
        elif kind == "background":
            assert HeldOut.background(codes[0], scene.background)
        else:
            assert HeldOut.recolour(codes[0], scene.objects[0].recolour)


def test_shares_of_held_out_combinations():
    names = [str(i) for i in range(2000)]
    assert np.mean([HeldOut.background(n, "blue") for n in names]) == pytest.approx(0.1, abs=0.02)
    assert np.mean([HeldOut.pair(n, "x") for n in names]) == pytest.approx(0.2, abs=0.03)
    assert all(HeldOut.pair(n, "x") == HeldOut.pair("x", n) for n in names)
    assert not any(HeldOut.background(n, "white") for n in names)


def test_number_in_the_caption_is_the_number_of_objects(scenes):
    for scene in scenes:
        said = [n for n, word in NUMBERS.items() if f"{word} " in f" {scene.caption}"]
        assert said == ([scene.count] if scene.kind == "count" else [])


def test_background_in_the_caption_is_the_colour_in_the_picture(sprites, scenes):
    for scene in scenes[:300]:
        said = scene.background if "background" in scene.caption else "white"
        edge = np.concatenate([(p := render(scene, sprites))[0], p[-1], p[:, 0], p[:, -1]])
        assert tuple(np.median(edge, axis=0)) == BACKGROUNDS[said], scene.caption


def test_objects_stand_where_the_caption_says(sprites, scenes):
    placed = [scene for scene in scenes if scene.position and scene.position != "in the center"]
    for scene in placed[:100]:
        picture = render(scene, sprites).astype(float)
        mass = np.abs(picture - BACKGROUNDS[scene.background]).sum(-1)
        y, x = (mass.sum(1 - axis) @ np.arange(64) / mass.sum() / 64 for axis in (0, 1))
        wanted = POSITIONS[scene.position]
        # the object's own middle may lie off the middle of its box
        assert abs(x - wanted[0]) < 0.2 and abs(y - wanted[1]) < 0.2, scene.caption
        assert scene.position in scene.caption


def test_pairs_stand_in_the_order_of_the_caption(scenes, sprites):
    for scene in (scene for scene in scenes if scene.kind == "pair"):
        first, second = scene.objects
        names = [sprites.concepts[placed.concept].name for placed in scene.objects]
        assert scene.caption.index(names[0]) < scene.caption.index(names[1])
        above = scene.relation == "above"
        assert (first.y < second.y - 0.3) if above else (first.x < second.x - 0.3)


def test_recoloured_object_has_the_hue_of_its_name(sprites, scenes):
    recoloured = [s for s in scenes if s.objects[0].recolour and s.background == "white"]
    assert len({scene.objects[0].recolour for scene in recoloured}) > 4
    for scene in recoloured[:100]:
        picture = render(scene, sprites).reshape(-1, 3)
        strong = picture[np.ptp(picture, axis=1) > 60]
        hues = np.array([360 * colorsys.rgb_to_hsv(*(c / 255))[0] for c in strong])
        wanted = RECOLOURS[scene.objects[0].recolour][0]
        assert np.median(np.abs((hues - wanted + 180) % 360 - 180)) < 20, scene.caption
        assert scene.objects[0].recolour in scene.caption


def test_named_colour_is_not_contradicted(sprites, sampler):
    apple = next(i for i, c in enumerate(sprites.concepts) if c.name == "red apple")
    assert sampler.vocabulary.recolours(apple, "3d") == []


def test_style_other_than_3d_is_always_said(scenes):
    for scene in scenes:
        if scene.style == "flat":
            assert "flat icon" in scene.caption
        elif scene.style == "noto":
            assert "noto style" in scene.caption
        else:
            assert "icon" not in scene.caption and "noto" not in scene.caption


def test_mirrored_scene_is_the_mirror_image(sprites, sampler):
    index = next(i for i in range(99) if sampler.scene(i).objects[0].mirrored)
    scene = sampler.scene(index)
    placed = scene.objects[0]
    straight = type(placed)(placed.concept, 0.5, 0.5, 0.75)
    turned = type(placed)(placed.concept, 0.5, 0.5, 0.75, mirrored=True)
    pictures = [
        render(type(scene)("", "single", (one,), "3d", "white"), sprites).astype(int)
        for one in (straight, turned)
    ]
    assert np.abs(pictures[0] - pictures[1][:, ::-1]).max() <= 1


def test_one_plain_prompt_for_every_concept(sprites, sampler):
    prompts = dict(sampler.concept_prompts())
    assert len(prompts) == len(sprites.concepts)
    assert {"a red apple", "an octopus", "an umbrella"} <= set(prompts.values())


def test_render_takes_any_size(sprites, scenes):
    assert render(scenes[0], sprites, size=128).shape == (128, 128, 3)
    assert render(scenes[0], sprites).dtype == np.uint8


def test_corpus_is_the_captions_of_the_scenes(sprites, sampler, scenes):
    assert list(caption_corpus(sampler, 3)) == [scene.caption for scene in scenes[:3]]
    phrases = keyword_phrases(sprites.concepts)
    assert len(phrases) == len(set(phrases))
    assert {"octopus", "an octopus", "light blue"} <= set(phrases)


def test_style_without_sprites_is_refused(sprites):
    with pytest.raises(RequestError, match="twemoji"):
        SceneSampler(sprites, mix=Mix(styles=(("twemoji", 1.0),)))


def test_unknown_kind_of_held_out_scenes_is_refused(sampler):
    with pytest.raises(RequestError, match="kind='style'"):
        sampler.held_out_scenes("style", 3)
