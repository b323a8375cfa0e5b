import pytest

from fewstep.errors import RequestError
from fewstep.training import load_recipe, recipe_names


@pytest.mark.parametrize("name", recipe_names())
def test_every_shipped_recipe_is_complete(name):
    assert load_recipe(name).run.steps > 0


def test_overrides_are_typed():
    recipe = load_recipe(
        "emoji64_4_lcm", ["run.steps=7", "consistency.target=stopgrad", "optimizer.lr=1"]
    )
    assert recipe.run.steps == 7
    assert recipe.settings.target == "stopgrad"
    assert recipe.optimizer.lr == 1.0
    assert isinstance(recipe.optimizer.lr, float)


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("run.step=7", "did you mean 'steps'"),
        ("run.steps=many", "steps must be a int"),
        ("consistency.target=none", "must be one of"),
        ("consistency.w_mim=1", "did you mean 'w_min'"),
        ("run.steps", "key=value"),
        ("phase=gan", "phase must be one of"),
        ("consistency.lora=8", "lora must be a section"),
        ("consistency.lora.rnk=8", "did you mean 'rank'"),
        ("consistency.sheet.prompts=apple", "prompts must be a list"),
        ("data.source=zip", "data.source must be one of"),
    ],
)
def test_wrong_overrides_are_refused_with_the_remedy(override, message):
    with pytest.raises(RequestError, match=message):
        load_recipe("emoji64_4_lcm", [override])


def test_an_unknown_recipe_names_the_nearest():
    with pytest.raises(RequestError, match="did you mean 'emoji64_4_lcm'"):
        load_recipe("emoji64_4_lmc")


def test_a_missing_section_is_named(tmp_path):
    (tmp_path / "r.toml").write_text('phase = "consistency"\nfolder = "x"\nseed = 0\n')
    with pytest.raises(RequestError, match="missing"):
        load_recipe(str(tmp_path / "r.toml"))


def test_what_a_phase_would_not_read_is_refused():
    with pytest.raises(RequestError, match=r"data\.held_out is not read by the phase 'teacher'"):
        load_recipe("emoji64_3_teacher", ["data.held_out=8"])


def test_a_section_may_turn_a_model_into_a_lora():
    recipe = load_recipe("lcm_sd15", ["consistency.lora.rank=8"])
    assert recipe.settings.lora.rank == 8
    assert recipe.settings.lora.alpha == 64.0


def test_an_entry_outside_of_its_section_is_told_where_it_belongs():
    with pytest.raises(RequestError, match=r"did you mean 'optimizer\.lr'"):
        load_recipe("lcm_sd15", ["lr=1e-4"])
