"""The schedulers by themselves: plans, rows, refusals, configs that survive."""

from __future__ import annotations

import inspect
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from fewstep import CheckpointError, DDIMScheduler, LCMScheduler, RequestError, UnsupportedConfig
from fewstep.schedulers import (
    SCHEDULERS,
    ConfigOnlyScheduler,
    DDPMScheduler,
    DPMSolverMultistepScheduler,
    EulerAncestralDiscreteScheduler,
    EulerDiscreteScheduler,
    HeunDiscreteScheduler,
    PNDMScheduler,
    SamplingScheduler,
    Scheduler,
    TCDScheduler,
    scheduler_from_config,
    spaced_timesteps,
)

SHAPE = (3, 4, 6, 6)
# Every scheduler that samples, without a memory between its steps, and with one.
SINGLE_STEP: list[Any] = [
    LCMScheduler(),
    TCDScheduler(),
    DDIMScheduler(set_alpha_to_one=False, clip_sample=False),
    DDPMScheduler(),
    EulerDiscreteScheduler(timestep_spacing="trailing"),
    EulerAncestralDiscreteScheduler(timestep_spacing="trailing"),
]
MULTISTEP: list[Any] = [
    DPMSolverMultistepScheduler(),
    DPMSolverMultistepScheduler(solver_order=3, use_karras_sigmas=True),
    DPMSolverMultistepScheduler(algorithm_type="sde-dpmsolver++", solver_type="heun"),
    DPMSolverMultistepScheduler(algorithm_type="dpmsolver", final_sigmas_type="sigma_min"),
    PNDMScheduler(skip_prk_steps=True),
]


def noise(seed: int, shape: tuple[int, ...] = SHAPE) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def no_draw() -> Tensor:
    raise AssertionError("noise was drawn")


@pytest.mark.parametrize(
    ("steps", "strength", "expected"),
    [
        (1, 1.0, [999]),
        (2, 1.0, [999, 499]),
        (3, 1.0, [999, 679, 339]),
        (4, 1.0, [999, 759, 499, 259]),
        (6, 1.0, [999, 839, 679, 499, 339, 179]),
        (8, 1.0, [999, 879, 759, 639, 499, 379, 259, 139]),
        (2, 0.5, [499, 259]),
        (4, 0.8, [799, 599, 399, 199]),
        (4, 0.2, [199, 159, 99, 59]),
    ],
)
def test_lcm_plans_are_the_published_ones(steps: int, strength: float, expected: list[int]) -> None:
    plan = LCMScheduler().plan(steps, strength=strength)
    assert plan.timesteps.tolist() == expected
    assert plan.next_timesteps.tolist() == [*expected[1:], -1]


@pytest.mark.parametrize(("steps", "total", "mean"), [(1, 18.7097, 0.0244), (10, 197.7616, 0.2575)])
def test_lcm_run_has_the_published_sums(steps: int, total: float, mean: float) -> None:
    scheduler = LCMScheduler()
    scheduler.set_timesteps(steps)
    generator = torch.Generator().manual_seed(0)
    z = (torch.arange(768).reshape(3, 8, 8, 4) / 768).permute(3, 0, 1, 2)
    for t in scheduler.timesteps:
        z = scheduler.step(z * t / (t + 1), t, z, generator=generator).prev_sample
    assert abs(float(z.abs().sum()) - total) < 1e-2
    assert abs(float(z.abs().mean()) - mean) < 1e-3


@pytest.mark.parametrize("scheduler", [*SINGLE_STEP, *MULTISTEP], ids=lambda s: type(s).__name__)
def test_a_runs_updates_are_its_steps_in_units_without_sigma(scheduler: Any) -> None:
    scheduler.set_timesteps(4)
    plan = scheduler.plan(4)
    is_drawn = "generator" in inspect.signature(scheduler.step).parameters
    draws, generator = torch.Generator().manual_seed(2), torch.Generator().manual_seed(2)
    arguments = {"generator": generator} if is_drawn else {}
    update = scheduler.updater(plan)
    stepped, updated = noise(1) * scheduler.init_noise_sigma, noise(1) * scheduler.start_scale(plan)
    for t, t_next in zip(*plan, strict=True):
        seen = scheduler.scale_model_input(stepped, t)
        torch.testing.assert_close(seen, updated, atol=1e-5, rtol=1e-5)
        stepped = scheduler.step(seen.sin(), t, stepped, **arguments).prev_sample
        updated, z0 = update(
            updated.sin(),
            updated,
            t.expand(3),
            t_next.expand(3),
            lambda: torch.randn(SHAPE, generator=draws),
        )
        assert z0.shape == SHAPE
    torch.testing.assert_close(stepped, updated, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("scheduler", SINGLE_STEP, ids=lambda s: type(s).__name__)
def test_rows_at_different_steps_give_what_each_gives_alone(scheduler: Any) -> None:
    z, output, drawn = noise(1), noise(2), noise(3)
    t, t_next = torch.tensor([999, 499, 259]), torch.tensor([499, 259, -1])
    together = scheduler.update(output, z, t, t_next, lambda: drawn)
    for i in range(3):
        row = slice(i, i + 1)
        alone = scheduler.update(output[row], z[row], t[row], t_next[row], lambda: drawn[row])  # noqa: B023
        for a, b in zip(alone, together, strict=True):
            assert torch.equal(a, b[row])


def test_the_last_step_draws_no_noise_and_ends_at_z0() -> None:
    t, t_next = torch.full((3,), 259), torch.full((3,), -1)
    ancestral = EulerAncestralDiscreteScheduler()
    for scheduler in (LCMScheduler(), DDIMScheduler(), DDPMScheduler(), ancestral, MULTISTEP[2]):
        z_next, z0 = scheduler.update(noise(2), noise(1), t, t_next, no_draw)
        torch.testing.assert_close(z_next, z0)


def test_update_keeps_no_state() -> None:
    scheduler = LCMScheduler()
    before = scheduler.timesteps.clone()
    scheduler.plan(2)
    scheduler.update(noise(1), noise(2), torch.full((3,), 9), torch.full((3,), 5), lambda: noise(3))
    assert torch.equal(scheduler.timesteps, before)
    assert scheduler.step_index is None and scheduler.num_inference_steps is None


def test_a_true_prediction_leads_back_to_z0() -> None:
    z0, drawn = noise(1), noise(2)
    unbounded = [DDIMScheduler(clip_sample=False), DDPMScheduler(clip_sample=False)]
    for scheduler in (*SINGLE_STEP[:2], *unbounded, *SINGLE_STEP[4:], *MULTISTEP):
        t = torch.tensor([99, 499, 899])
        z = scheduler.diffuse(z0, drawn, t)
        _, predicted = scheduler.update(drawn, z, t, torch.full((3,), -1), no_draw)
        torch.testing.assert_close(predicted, z0, atol=1e-4, rtol=1e-4)


def test_ddim_at_full_eta_keeps_the_noise_level() -> None:
    scheduler = DDIMScheduler(clip_sample=False)
    z0, start, fresh = (noise(seed, (1, 4, 64, 64)) for seed in (1, 2, 3))
    t, t_next = torch.tensor([600]), torch.tensor([400])
    z = scheduler.add_noise(z0, start, t)
    z_next, _ = scheduler.update(start, z, t, t_next, lambda: fresh, eta=1.0)
    alpha, sigma = scheduler.noise_schedule.alpha_sigma(t_next, z0)
    assert abs(float((z_next - alpha * z0).std() / sigma) - 1) < 0.02


def test_thresholding_and_clipping_bound_z0() -> None:
    t, last = torch.full((3,), 999), torch.full((3,), -1)
    for config in ({"clip_sample": True}, {"thresholding": True}):
        _, z0 = LCMScheduler(**config).update(noise(2), noise(1) * 5, t, last, no_draw)
        assert float(z0.abs().max()) <= 1.0001


def test_half_precision_comes_back_as_half_precision() -> None:
    t, t_next = torch.full((3,), 999), torch.full((3,), 499)
    for dtype in (torch.float16, torch.bfloat16, torch.float64):
        z = noise(1).to(dtype)
        for scheduler in (*SINGLE_STEP, *MULTISTEP):
            for result in scheduler.update(noise(2).to(dtype), z, t, t_next, lambda: z):  # noqa: B023
                assert result.dtype == dtype


def test_results_are_read_by_name_by_place_and_unpacked() -> None:
    scheduler = LCMScheduler()
    scheduler.set_timesteps(2)
    output = scheduler.step(noise(1), 999, noise(2))
    prev_sample, denoised = output
    assert prev_sample is output.prev_sample is output[0]
    assert denoised is output.denoised is output[1]
    assert isinstance(scheduler.step(noise(1), 499, noise(2), return_dict=False), tuple)


def test_step_knows_its_place() -> None:
    scheduler = LCMScheduler()
    assert (scheduler.order, scheduler.init_noise_sigma, len(scheduler)) == (1, 1.0, 1000)
    assert scheduler.timesteps.tolist() == list(range(999, -1, -1))
    scheduler.set_timesteps(2)
    assert (scheduler.step_index, scheduler.begin_index) == (None, None)
    scheduler.step(noise(1), 999, noise(2))
    assert scheduler.step_index == 1
    scheduler.step(noise(1), 499, noise(2))
    with pytest.raises(RequestError, match="set_timesteps again"):
        scheduler.step(noise(1), 499, noise(2))
    assert scheduler.index_for_timestep(torch.tensor(499)) == 1
    with pytest.raises(RequestError, match="timestep 5 is not planned"):
        scheduler.index_for_timestep(5)


def test_truncated_given_times_end_without_noise() -> None:
    scheduler = LCMScheduler()
    scheduler.set_timesteps(timesteps=[999, 759, 499, 259], strength=0.5)
    assert scheduler.timesteps.tolist() == [499, 259]
    z = noise(1)
    for t in scheduler.timesteps:
        result = scheduler.step(noise(2), t, z)
        z = result.prev_sample
    assert torch.equal(result.prev_sample, result.denoised)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({}, "either num_inference_steps or timesteps"),
        ({"num_inference_steps": 4, "timesteps": [999]}, "either num_inference_steps or timesteps"),
        ({"num_inference_steps": 0}, "num_inference_steps must lie in"),
        ({"num_inference_steps": 51}, r"\[1, 50\]"),
        ({"num_inference_steps": 1001}, r"\[1, 1000\]"),
        ({"num_inference_steps": 4, "original_inference_steps": 1001}, "original_inference_steps"),
        ({"num_inference_steps": 4, "original_inference_steps": 0}, "original_inference_steps"),
        ({"num_inference_steps": 4, "strength": 0.05}, "strength=0.05 leaves 2 of 50"),
        ({"num_inference_steps": 4, "strength": 0.0}, r"strength must lie in \(0, 1\]"),
        ({"num_inference_steps": 4, "strength": 1.5}, r"strength must lie in \(0, 1\]"),
        ({"timesteps": [999, 999]}, "strictly descending"),
        ({"timesteps": [259, 499]}, "strictly descending"),
        ({"timesteps": []}, "strictly descending"),
        ({"timesteps": [1000, 499]}, r"\[0, 999\]"),
        ({"timesteps": [999, -1]}, r"\[0, 999\]"),
        ({"timesteps": [999], "strength": 0.5}, "leaves none of 1"),
    ],
)
def test_lcm_refuses_plans_that_cannot_be(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(RequestError, match=message):
        LCMScheduler().plan(**arguments)
    with pytest.raises(ValueError, match=message):
        LCMScheduler().set_timesteps(**arguments)


def test_ddim_refuses_what_cannot_be() -> None:
    with pytest.raises(RequestError, match="use fewer steps"):
        DDIMScheduler(steps_offset=1).plan(1000)
    scheduler = DDIMScheduler()
    with pytest.raises(RequestError, match="call set_timesteps"):
        scheduler.step(noise(1), 999, noise(2))
    scheduler.set_timesteps(10)
    with pytest.raises(RequestError, match=r"eta must lie in \[0, 1\], got 2"):
        scheduler.step(noise(1), 900, noise(2), eta=2)
    with pytest.raises(RequestError, match="generator or variance_noise"):
        scheduler.step(
            noise(1), 900, noise(2), generator=torch.Generator(), variance_noise=noise(3)
        )
    with pytest.raises(RequestError, match="spacing"):
        spaced_timesteps(4, spacing="even")


def test_ddim_goes_through_given_times() -> None:
    scheduler = DDIMScheduler()
    plan = scheduler.plan(timesteps=torch.tensor([900, 400, 10]))
    assert plan.next_timesteps.tolist() == [400, 10, -1]
    scheduler.set_timesteps(timesteps=[900, 400, 10])
    result = scheduler.step(noise(1), 400, noise(2))
    expected, _ = scheduler.update(
        noise(1), noise(2), torch.full((3,), 400), torch.full((3,), 10), no_draw
    )
    assert torch.equal(result.prev_sample, expected)


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"beta_schedule": "cubic"}, "beta_schedule='cubic'"),
        ({"prediction_type": "noise"}, "prediction_type='noise'"),
        ({"rescale_betas_zero_snr": True}, "zero terminal SNR"),
        ({"trained_betas": [0.1, 0.2]}, "trained_betas has 2 entries"),
    ],
)
def test_configs_that_are_not_implemented_are_refused(config: dict[str, Any], message: str) -> None:
    for kind in (LCMScheduler, DDIMScheduler, TCDScheduler, DDPMScheduler):
        with pytest.raises(UnsupportedConfig, match=message):
            kind(**config)


def test_ddim_names_an_unknown_spacing() -> None:
    with pytest.raises(UnsupportedConfig, match="timestep_spacing='karras'"):
        DDIMScheduler(timestep_spacing="karras")


def test_an_unknown_keyword_names_the_nearest() -> None:
    with pytest.raises(TypeError, match="'beta_star'; the nearest is 'beta_start'"):
        LCMScheduler(beta_star=0.1)
    with pytest.raises(TypeError, match="'timestep_spacng'"):
        DDIMScheduler.from_config(LCMScheduler().config, timestep_spacng="trailing")
    with pytest.raises(RequestError, match="from_pretrained loads a folder"):
        LCMScheduler.from_config("some/folder")


def test_lcm_takes_over_what_is_set_and_gives_it_back() -> None:
    heun = HeunDiscreteScheduler(beta_end=0.012, use_karras_sigmas=True, clip_sample_range=2.0)
    lcm = LCMScheduler.from_config(heun.config, original_inference_steps=25)
    assert (lcm.config.beta_end, lcm.config.clip_sample_range) == (0.012, 2.0)
    assert lcm.config.beta_start == 0.00085
    assert lcm.config.original_inference_steps == 25
    assert lcm.config["use_karras_sigmas"] is True and "use_karras_sigmas" in lcm.config
    back = HeunDiscreteScheduler.from_config(lcm.config)
    assert heun.config.to_dict().items() <= back.config.to_dict().items()
    # What LCM only had by default does not become Heun's.
    assert "beta_start" not in back.config
    ddim = DDIMScheduler.from_config(lcm.config)
    assert (ddim.config.beta_start, ddim.config.beta_end) == (0.0001, 0.012)


def test_a_config_is_frozen_and_knows_its_class() -> None:
    scheduler = LCMScheduler.from_config(DDIMScheduler().config)
    with pytest.raises(AttributeError):
        scheduler.config.beta_end = 1.0
    assert isinstance(scheduler_from_config(scheduler.config), LCMScheduler)


@pytest.mark.parametrize("kind", SCHEDULERS.values(), ids=SCHEDULERS)
def test_save_and_load_are_equal(kind: type[Scheduler], tmp_path: Path) -> None:
    scheduler = kind(beta_end=0.03, trained_betas=[0.01] * 1000, prediction_type="v_prediction")
    scheduler.save_pretrained(tmp_path / "scheduler")
    loaded = kind.from_pretrained(tmp_path, subfolder="scheduler")
    assert loaded.config.to_dict() == scheduler.config.to_dict()
    path = tmp_path / "scheduler" / "scheduler_config.json"
    stored = json.loads(path.read_text())
    assert stored["_class_name"] == kind.__name__
    assert kind.load_config(tmp_path / "scheduler") == stored
    assert path.read_text() == json.dumps(stored, indent=2, sort_keys=True) + "\n"
    changed = kind.from_pretrained(tmp_path, subfolder="scheduler", beta_end=0.04)
    assert changed.config.beta_end == 0.04
    assert repr(changed).startswith(f"{kind.__name__} {{")


def test_a_scheduler_without_its_file_says_what_there_is(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(CheckpointError, match=r"no file scheduler_config.json .* config.json"):
        LCMScheduler.from_pretrained(tmp_path)


def test_any_class_is_carried_and_saved_as_it_came(tmp_path: Path) -> None:
    stored = {
        "_class_name": "SomethingNewScheduler",
        "_diffusers_version": "0.99.0",
        "num_train_timesteps": 500,
        "shift": 3.0,
        "levels": [1, 2],
    }
    scheduler = scheduler_from_config(stored)
    assert type(scheduler) is ConfigOnlyScheduler and len(scheduler) == 500
    scheduler.save_pretrained(tmp_path)
    assert json.loads((tmp_path / "scheduler_config.json").read_text()) == stored
    with pytest.raises(RequestError, match="SomethingNewScheduler is not implemented for sampling"):
        scheduler.plan(4)


def test_known_names_have_classes_that_refuse_to_sample() -> None:
    scheduler = scheduler_from_config({"_class_name": "HeunDiscreteScheduler", "beta_end": 0.1})
    assert isinstance(scheduler, HeunDiscreteScheduler)
    z = noise(1)
    for call in (
        lambda: scheduler.plan(4),
        lambda: scheduler.set_timesteps(4),
        lambda: scheduler.step(z, 1, z),
        lambda: scheduler.update(z, z, 1, 1, no_draw),
        lambda: scheduler.add_noise(z, z, torch.tensor(1)),
        lambda: scheduler.diffuse(z, z, torch.tensor(1)),
        lambda: scheduler.get_velocity(z, z, torch.tensor(1)),
        lambda: scheduler.scale_model_input(z),
    ):
        with pytest.raises(RequestError, match=r"HeunDiscrete.* LCMScheduler.from_config"):
            call()
    with pytest.raises(UnsupportedConfig, match="no _class_name"):
        scheduler_from_config({"beta_end": 0.1})


@pytest.mark.parametrize(
    ("kind", "config", "message"),
    [
        (EulerDiscreteScheduler, {"timestep_spacing": "even"}, "timestep_spacing='even'"),
        (EulerDiscreteScheduler, {"use_exponential_sigmas": True}, "use_exponential_sigmas=True"),
        (EulerDiscreteScheduler, {"interpolation_type": "log_linear"}, "log_linear"),
        (EulerDiscreteScheduler, {"final_sigmas_type": "one"}, "final_sigmas_type='one'"),
        (EulerDiscreteScheduler, {"use_karras_sigmas": True, "sigma_max": 800}, "sigma_max=800"),
        (DPMSolverMultistepScheduler, {"use_lu_lambdas": True}, "use_lu_lambdas=True"),
        (DPMSolverMultistepScheduler, {"algorithm_type": "sde-dpmsolver"}, "'dpmsolver'"),
        (DPMSolverMultistepScheduler, {"algorithm_type": "dpmsolver"}, "use 'sigma_min'"),
        (DPMSolverMultistepScheduler, {"solver_order": 4}, "solver_order=4"),
        (
            DPMSolverMultistepScheduler,
            {"solver_order": 3, "algorithm_type": "sde-dpmsolver++"},
            "use solver_order=2",
        ),
        (DDPMScheduler, {"variance_type": "learned"}, "variance_type='learned'"),
        (
            PNDMScheduler.from_config,
            {"config": {"rescale_betas_zero_snr": True, "prediction_type": "v_prediction"}},
            "use DDIMScheduler",
        ),
    ],
)
def test_solvers_name_what_they_do_not_implement(
    kind: Any, config: dict[str, Any], message: str
) -> None:
    with pytest.raises(UnsupportedConfig, match=message):
        kind(**config)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: PNDMScheduler().plan(4), "skip_prk_steps=True"),
        (lambda: DPMSolverMultistepScheduler().plan(1000), "too many for 'linspace'"),
        (
            lambda: EulerDiscreteScheduler(use_karras_sigmas=True).plan(timesteps=[900, 100]),
            "use_karras_sigmas=False",
        ),
        (
            lambda: DPMSolverMultistepScheduler(use_karras_sigmas=True).plan(timesteps=[900]),
            "timesteps cannot be given",
        ),
        (lambda: EulerDiscreteScheduler().scale_model_input(noise(1)), "timestep is missing"),
        (lambda: EulerDiscreteScheduler().step(noise(1), 9, noise(1), s_churn=1.0), "s_churn=1.0"),
        (lambda: EulerDiscreteScheduler().step(noise(1), 9, noise(1)), "call set_timesteps"),
        (lambda: TCDScheduler().plan(4, original_inference_steps=2), r"in \[4, 1000\]"),
        (
            lambda: TCDScheduler().update(noise(1), noise(2), *END, no_draw, eta=1.5),
            r"eta must lie in \[0, 1\], got 1.5",
        ),
        (
            lambda: EulerDiscreteScheduler(timestep_spacing="leading", steps_offset=1).plan(1000),
            "use fewer steps",
        ),
    ],
)
def test_solvers_refuse_what_cannot_be(call: Any, message: str) -> None:
    with pytest.raises(RequestError, match=message):
        call()


END = (torch.full((3,), 259), torch.full((3,), -1))


def test_only_leading_times_start_from_all_of_the_noise() -> None:
    for kind in (EulerDiscreteScheduler, EulerAncestralDiscreteScheduler):
        scales = []
        for spacing in ("leading", "linspace", "trailing"):
            scheduler = kind(timestep_spacing=spacing)
            scales.append(scheduler.start_scale(scheduler.plan(4)))
        assert scales[0] == 1 and 0.9 < scales[1] == scales[2] < 1
    assert LCMScheduler().start_scale(LCMScheduler().plan(4)) == 1


@pytest.mark.parametrize("scheduler", MULTISTEP, ids=lambda s: type(s).__name__)
def test_each_run_of_a_multistep_solver_has_its_own_memory(scheduler: Any) -> None:
    def run() -> Tensor:
        z, plan = noise(1), scheduler.plan(6)
        update, draws = scheduler.updater(plan), torch.Generator().manual_seed(0)
        for t, t_next in zip(*plan, strict=True):
            z, _ = update(
                z.sin(),
                z,
                t.expand(3),
                t_next.expand(3),
                lambda: torch.randn(SHAPE, generator=draws),
            )
        return z

    assert torch.equal(run(), run())


def test_a_part_of_a_plan_knows_its_place() -> None:
    scheduler = DPMSolverMultistepScheduler(use_karras_sigmas=True)
    plan = scheduler.plan(20)
    part = plan.part(5, 20).part(2, 9)
    assert (part.begin, part.total, len(part.timesteps)) == (7, 20, 7)
    assert part.start == plan.next_timesteps[6] and part.start != part.timesteps[0]
    assert torch.equal(part.next_timesteps, plan.next_timesteps[7:14])
    assert scheduler.updater(part).order() == 2


def test_dpm_solver_lowers_its_order_at_the_end_of_a_whole_run() -> None:
    scheduler = DPMSolverMultistepScheduler(solver_order=3)
    for steps, orders in ((6, [3, 3, 3, 3, 2, 1]), (15, [3] * 14 + [1])):
        run = scheduler.updater(scheduler.plan(steps))
        found = []
        for run.index in range(steps):
            found.append(run.order())
        assert found == orders


def test_dpm_solver_understands_the_solvers_of_other_classes() -> None:
    for name, config in (
        ("UniPCMultistepScheduler", {"solver_type": "bh2"}),
        ("DEISMultistepScheduler", {"solver_type": "logrho", "algorithm_type": "deis"}),
    ):
        other = SCHEDULERS[name](**config)
        scheduler = DPMSolverMultistepScheduler.from_config(other.config)
        assert scheduler.config.solver_type == "midpoint"
        assert scheduler.config.algorithm_type == "dpmsolver++"


def test_every_scheduler_that_samples_gives_finite_latents_at_zero_terminal_snr() -> None:
    config = {"rescale_betas_zero_snr": True, "prediction_type": "v_prediction"}
    for kind in SCHEDULERS.values():
        if not issubclass(kind, SamplingScheduler) or kind is PNDMScheduler:
            continue
        spaced: Any = kind(**config, timestep_spacing="trailing")
        plan = spaced.plan(3)
        assert int(plan.timesteps[0]) == 999
        update, z = spaced.updater(plan), noise(1)
        for t, t_next in zip(*plan, strict=True):
            z, _ = update(z.sin(), z, t.expand(3), t_next.expand(3), lambda: noise(2))
        assert z.isfinite().all(), kind


def test_pipelines_correct_outdated_settings_that_a_class_only_carries() -> None:
    from fewstep.pipelines.families import StableDiffusion

    old = {"clip_sample": True, "steps_offset": 0, "skip_prk_steps": True}
    with pytest.warns(UserWarning, match="replaced clip_sample=True by False, steps_offset=0 by 1"):
        scheduler = StableDiffusion.adjusted(PNDMScheduler.from_config(old))
    assert isinstance(scheduler, PNDMScheduler) and scheduler.config.steps_offset == 1
    assert LCMScheduler.from_config(scheduler.config).config.clip_sample is False
