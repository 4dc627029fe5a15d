"""Wrong versions of w2svd.py and hunyuan.py, and for each the test that must notice.

    python tests/mutations.py

copies the project to a temporary folder for each mutation, replaces its text there, which must
occur exactly once, and runs the named test on the copy, where it must fail; on an unmutated copy
all of them must pass. Prints a line for each; exit code 1 if a mutation survives. A minute on two
cores: the libraries are imported once, in a process from which those of the trials are forked.
"""

import contextlib
import io
import multiprocessing
import os
import re
import shutil
import sys
import tempfile
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).resolve().parent.parent
PARTS = ("w2svd.py", "hunyuan.py", "toy", "tests", "pyproject.toml", "README.md")
LIBRARIES = ["pytest", "torch", "peft", "einops", "scipy", "matplotlib.figure", "PIL.Image",
             "tqdm", "safetensors.torch", "diffusers.schedulers"]  # fmt: skip
PASSED, FAILED = 0, 1  # pytest's exit codes; any other says that no test ran as it should


class Mutation(NamedTuple):
    """edits: (text, replacement) pairs; test: 'file::test' below tests/, in each of its cases."""

    name: str
    edits: list
    test: str
    file: str = "w2svd.py"


def one(name, text, replacement, test, file="w2svd.py"):
    return Mutation(name, [(text, replacement)], test, file)


MUTATIONS = [
    # ---- flow matching and the samplers
    one(
        "the shift is applied twice to the grid",
        "dtype=torch.float64), shift).float()",
        "dtype=torch.float64), shift * shift).float()",
        "test_flow_matching.py::test_the_four_step_grid_of_shift_5_is_that_of_the_author_s_code",
    ),
    one(
        "the shift is applied twice to the losses' noise levels",
        "return shift_sigma(low + (high - low) * u, shift)",
        "return shift_sigma(shift_sigma(low + (high - low) * u, shift), shift)",
        "test_flow_matching.py::"
        "test_noise_levels_are_uniform_between_low_and_high_and_then_shifted_once",
    ),
    one(
        "the range of noise levels is taken of the shifted ones",
        "return shift_sigma(low + (high - low) * u, shift)",
        "return low + (high - low) * shift_sigma(u, shift)",
        "test_flow_matching.py::"
        "test_noise_levels_are_uniform_between_low_and_high_and_then_shifted_once",
    ),
    one(
        "sigma and 1 - sigma are swapped",
        "return (1 - sigma) * x0 + sigma * eps",
        "return sigma * x0 + (1 - sigma) * eps",
        "test_flow_matching.py::"
        "test_noise_level_0_is_the_sample_1_is_the_noise_and_between_is_the_straight_line",
    ),
    one(
        "the velocity's sign is flipped",
        "return x_t - _like(sigma, x_t) * v",
        "return x_t + _like(sigma, x_t) * v",
        "test_flow_matching.py::"
        "test_the_velocity_of_one_sample_leads_back_to_it_and_scores_its_noise",
    ),
    one(
        "the score's sign is flipped",
        "return -(x_t + (1 - sigma) * v) / sigma",
        "return (x_t + (1 - sigma) * v) / sigma",
        "test_flow_matching.py::"
        "test_score_and_clean_sample_of_a_gaussian_are_autograds_and_tweedies",
    ),
    one(
        "guidance is counted from 0",
        "return v_uncond + w * (v_cond - v_uncond)",
        "return v_cond + w * (v_cond - v_uncond)",
        "test_flow_matching.py::"
        "test_guidance_is_off_at_1_ignores_the_condition_at_0_and_extrapolates_beyond",
    ),
    one(
        "few-step sampling adds its first noise again",
        "x = add_noise(x0, fresh, sigma_next)",
        "x = add_noise(x0, noise, sigma_next)",
        "test_flow_matching.py::"
        "test_few_step_sampling_is_diffusers_stochastic_scheduler_at_every_step",
    ),
    one(
        "few-step sampling ignores its generator",
        "fresh = torch.randn(x.shape, generator=rng, device",
        "fresh = torch.randn(x.shape, device",
        "test_flow_matching.py::"
        "test_few_step_sampling_is_diffusers_stochastic_scheduler_at_every_step",
    ),
    one(
        "Euler steps go up the noise",
        "x = x + (sigma_next - sigma) * v",
        "x = x + (sigma - sigma_next) * v",
        "test_flow_matching.py::test_euler_sampling_is_diffusers_deterministic_scheduler",
    ),
    # ---- losses
    one(
        "the DMD gradient's sign is flipped",
        "return (x0_fake - x0_real) / _mean_abs(x_gen - x0_real)",
        "return (x0_real - x0_fake) / _mean_abs(x_gen - x0_real)",
        "test_losses.py::test_the_dmd_gradient_of_gaussians_is_autograd_of_the_exact_kl",
    ),
    one(
        "the normaliser is that of the batch",
        "dim=tuple(range(1, x.ndim)), keepdim=True)",
        "dim=tuple(range(0, x.ndim)), keepdim=True)",
        "test_losses.py::test_the_dmd_denominator_is_each_samples_own",
    ),
    one(
        "the normaliser is the distance to the fake's sample",
        "/ _mean_abs(x_gen - x0_real)\n",
        "/ _mean_abs(x_gen - x0_fake)\n",
        "test_losses.py::test_the_dmd_gradient_of_gaussians_is_autograd_of_the_exact_kl",
    ),
    one(
        "the normaliser has no floor",
        "keepdim=True).clamp_min(1e-6)",
        "keepdim=True)",
        "test_losses.py::test_a_perfect_match_divides_by_the_floor_and_not_by_zero",
    ),
    one(
        "half precision predictions are subtracted in half precision",
        "return x.to(torch.promote_types(x.dtype, torch.float32))",
        "return x",
        "test_losses.py::test_half_precision_predictions_are_compared_in_float32",
    ),
    one(
        "the GT gradient's sign is flipped",
        "difference = _accurate(x0_fake) - _accurate(x0_gt)",
        "difference = _accurate(x0_gt) - _accurate(x0_fake)",
        "test_losses.py::test_the_gt_gradient_by_hand_on_a_gaussian",
    ),
    one(
        "the fake learns the reversed velocity",
        "mse_loss(_accurate(v_fake), _accurate(eps - x_gen))",
        "mse_loss(_accurate(v_fake), _accurate(x_gen - eps))",
        "test_losses.py::test_the_fake_loss_is_least_at_the_exact_velocity",
    ),
    # ---- roles
    one(
        "alpha_weak and alpha_strong are swapped",
        '{"fake": self.alpha_strong, "real": self.alpha_weak}',
        '{"fake": self.alpha_weak, "real": self.alpha_strong}',
        "test_roles.py::test_each_role_is_the_plain_backbone_with_its_merged_weights",
    ),
    one(
        "the real DiT reads the generator's adapter",
        'adapter = "fake" if role == "real" else role',
        'adapter = "generator" if role == "real" else role',
        "test_roles.py::test_each_role_is_the_plain_backbone_with_its_merged_weights",
    ),
    one(
        "blocks are recomputed outside the role of their forward",
        ", context_fn=lambda: (\n            nullcontext(), self.use(role, alpha)))",
        ")",
        "test_roles.py::test_checkpointing_changes_no_gradient_wherever_the_backward_is",
    ),
    one(
        "the role before does not come back after an exception",
        "        try:\n            yield\n        finally:\n            self._switch(*before)",
        "        yield\n        self._switch(*before)",
        "test_roles.py::test_the_role_before_comes_back_after_an_exception",
    ),
    one(
        "roles do not nest",
        "            self._switch(*before)",
        "            self._switch(None)",
        "test_roles.py::test_roles_nest_and_the_one_before_comes_back",
    ),
    one(
        "only the last adapter requires gradients",
        "for parameter in self.trained[role].values():",
        'for parameter in self.trained["fake"].values():',
        "test_roles.py::test_both_adapters_and_nothing_else_require_gradients",
    ),
    one(
        "the backbone is trained along",
        "backbone.module.requires_grad_(False)",
        "backbone.module.requires_grad_(True)",
        "test_roles.py::test_each_step_gives_gradients_to_its_own_role_alone",
    ),
    one(
        "switching flips requires_grad, as peft's own does",
        "            layer._active_adapter = active\n",
        "            layer.set_adapter(active) if active else None\n"
        "            layer._active_adapter = active\n",
        "test_roles.py::test_switching_roles_between_forward_and_backward_loses_no_gradient",
    ),
    one(
        "the real DiT is the full fake",
        "self.copies.get(role, self.backbone)",
        'self.copies.get("fake" if role == "real" else role, self.backbone)',
        "test_roles.py::"
        "test_full_roles_own_their_copies_and_the_real_dit_is_the_plain_backbone",
    ),
    one(
        "the adapters' alpha is twice their rank",
        "layer.scaling[name] = scale",
        "layer.scaling[name] = 2 * scale",
        "test_roles.py::test_each_role_is_the_plain_backbone_with_its_merged_weights",
    ),
    # ---- updates
    one(
        "the real branch is left in the graph",
        "        with torch.no_grad():\n            x_t = add_noise(x_gen, eps, sigma)\n",
        "        with nullcontext():\n            x_t = add_noise(x_gen, eps, sigma)\n",
        "test_roles.py::test_the_gradient_that_enters_the_generators_backward_has_no_graph",
    ),
    Mutation(
        "the loss is differentiated through fake and real",
        [
            (
                "        with torch.no_grad():\n            x_t = add_noise(x_gen, eps, sigma)\n",
                "        with nullcontext():\n            x_t = add_noise(x_gen, eps, sigma)\n",
            ),
            (
                "x_gen.backward(g.to(x_gen.dtype) / g.numel())",
                "(x_gen * g).mean().backward()",
            ),
        ],
        "test_updates.py::"
        "test_the_generators_update_is_autograd_of_its_loss_with_the_gradient_held_fixed",
    ),
    one(
        "the generator's gradient is a sum, not a mean",
        "x_gen.backward(g.to(x_gen.dtype) / g.numel())",
        "x_gen.backward(g.to(x_gen.dtype))",
        "test_updates.py::"
        "test_the_generators_update_is_autograd_of_its_loss_with_the_gradient_held_fixed",
    ),
    one(
        "the real DiT keeps a little of the adapter at alpha_weak = 0",
        "if adapter in self.adapters and alpha else []",
        "if adapter in self.adapters else []\n        alpha = alpha or 1e-3",
        "test_updates.py::test_alpha_weak_0_is_dmd_with_a_separate_real_dit_bit_for_bit",
    ),
    one(
        "fake and real see different noise",
        "v_fake, v_real = roles.fake(x_t, sigma, cond), roles.real(x_t, sigma, cond)",
        "v_fake, v_real = roles.fake(x_t, sigma, cond), roles.real(x_t + 0.1 * eps, sigma, cond)",
        "test_updates.py::test_equal_alphas_give_the_generator_a_gradient_of_exactly_zero",
    ),
    one(
        "the guided real DiT keeps the condition",
        "guided(v_real, roles.real(x_t, sigma, None), guidance)",
        "guided(v_real, roles.real(x_t, sigma, cond), guidance)",
        "test_updates.py::"
        "test_the_generators_update_is_autograd_of_its_loss_with_the_gradient_held_fixed",
    ),
    one(
        "the GT loss skips everything but noise",
        "counts = sigma_in < 1 if",
        "counts = sigma_in == 1 if",
        "test_updates.py::"
        "test_skipping_noise_leaves_the_ground_truth_out_where_the_input_is_pure_noise",
    ),
    one(
        "the fake's update trains the generator",
        "    with torch.no_grad():\n        v = roles.generator(x_in, sigma_in, batch",
        "    with nullcontext():\n        v = roles.generator(x_in, sigma_in, batch",
        "test_roles.py::test_each_step_gives_gradients_to_its_own_role_alone",
    ),
    one(
        "the fake is trained at another strength than it is read",
        "v_fake = roles.fake(x_t, sigma, batch",
        "v_fake = roles.real(x_t, sigma, batch",
        "test_updates.py::"
        "test_the_fakes_update_is_autograd_of_flow_matching_on_the_generators_samples",
    ),
    one(
        "the fake learns real samples",
        "loss = fake_loss(v_fake, x_gen, eps)",
        'loss = fake_loss(v_fake, batch["x0"], eps)',
        "test_updates.py::"
        "test_the_fakes_update_is_autograd_of_flow_matching_on_the_generators_samples",
    ),
    one(
        "a rollout takes one evaluation too many",
        "path = sigmas[: int(exits) + 1]",
        "path = sigmas[: int(exits) + 2]",
        "test_updates.py::"
        "test_rollout_inputs_are_the_generators_own_states_at_one_random_exit",
    ),
    one(
        "a batch of paired inputs has one noise level",
        'n = {"paired": len(x0), "rollout": 1}[kind]',
        "n = 1",
        "test_updates.py::"
        "test_paired_inputs_are_the_real_samples_noised_to_levels_of_the_grid",
    ),
    one(
        "non-finite values pass",
        "    if bad.any():",
        "    if False:",
        "test_updates.py::"
        "test_a_non_finite_value_stops_the_step_with_stage_and_noise_level_and_no_gradient",
    ),
    one(
        "motion is measured along the height",
        "x_gen.diff(dim=2).abs()",
        "x_gen.diff(dim=3).abs()",
        "test_updates.py::"
        "test_videos_have_a_motion_beside_the_datas_and_points_have_none",
    ),
    one(
        "the moving average keeps 1 - decay",
        "self.ema[name].lerp_(parameter, 1 - decay)",
        "self.ema[name].lerp_(parameter, decay)",
        "test_updates.py::test_the_moving_average_keeps_decay_of_the_old_weights",
    ),
    # ---- HunyuanVideo
    one(
        "the text's mask reaches attention",
        "lambda _, args: (*args[:3], None, *args[4:])",
        "lambda _, args: args",
        "test_hunyuan.py::test_no_mask_reaches_attention_in_any_role",
        "hunyuan.py",
    ),
    one(
        "timesteps are rounded to bf16",
        "timestep=1000 * sigma.float()",
        "timestep=(1000 * sigma).to(self.dtype)",
        "test_hunyuan.py::test_guidance_and_timestep_are_the_stock_pipeline_s_in_bf16",
        "hunyuan.py",
    ),
    one(
        "adapters compute in float32",
        "enabled=self.dtype != torch.float32",
        "enabled=False",
        "test_hunyuan.py::test_adapters_are_float32_and_compute_in_bf16_on_a_bf16_base",
        "hunyuan.py",
    ),
    one(
        "latents are not scaled",
        'latents.float() * info["scaling"]',
        "latents.float()",
        "test_hunyuan.py::test_a_clip_is_the_vae_s_scaled_mode_and_its_trimmed_text",
        "hunyuan.py",
    ),
    one(
        "text is not trimmed",
        "embeds[:, mask[0].bool()]",
        "embeds",
        "test_hunyuan.py::test_a_clip_is_the_vae_s_scaled_mode_and_its_trimmed_text",
        "hunyuan.py",
    ),
    one(
        "the pipeline shifts the grid again",
        "FlowMatchEulerDiscreteScheduler(shift=1.0, stochastic_sampling=True)\n    if",
        "FlowMatchEulerDiscreteScheduler(shift=5.0, stochastic_sampling=True)\n    if",
        "test_hunyuan.py::test_sample_draws_our_latents_in_the_stock_pipeline",
        "hunyuan.py",
    ),
    one(
        "the pipeline's renoising is not seeded",
        "    torch.manual_seed(seed)  # NOTE",
        "    # NOTE",
        "test_hunyuan.py::test_sample_draws_our_latents_in_the_stock_pipeline",
        "hunyuan.py",
    ),
    one(
        "ComfyUI's fused layers are stacked in reverse",
        "torch.cat(A)",
        "torch.cat(A[::-1])",
        "test_hunyuan.py::test_the_comfyui_file_converts_back_to_the_same_weights",
        "hunyuan.py",
    ),
]  # fmt: skip


def mutate(source, edits):
    for text, replacement in edits:
        if source.count(text) != 1:
            raise ValueError(f"{source.count(text)} times, not once: {text!r}")
        source = source.replace(text, replacement)
    return source


def run_tests(edits, file, tests):
    """Pytest's exit code and output for the tests, on a copy of the project with the edits."""
    with tempfile.TemporaryDirectory() as folder:
        for part in PARTS:
            copy = shutil.copytree if (ROOT / part).is_dir() else shutil.copy
            copy(ROOT / part, Path(folder, part))
        Path(folder, file).write_text(mutate((ROOT / file).read_text(), edits))
        os.chdir(folder)
        own = {str(ROOT), str(ROOT / "tests"), ""}  # the copy only, never the original
        sys.path[:] = [folder, *(path for path in sys.path if path not in own)]
        import pytest

        output = io.StringIO()
        with contextlib.redirect_stdout(output), contextlib.redirect_stderr(output):
            paths = [f"tests/{test}" for test in tests]
            code = pytest.main(["-x", "--disable-warnings", "-p", "no:cacheprovider", *paths])
        loaded = Path(sys.modules["w2svd"].__file__)
        os.chdir(ROOT)
        if loaded != Path(folder, "w2svd.py"):
            raise RuntimeError(f"the tests ran on {loaded}")
        return int(code), output.getvalue()


def trial(mutation):
    """(as it must be, one line); None for the unmutated project."""
    if mutation is None:
        code, output = run_tests([], "w2svd.py", sorted({m.test for m in MUTATIONS}))
        summary = next((x for x in output.splitlines()[::-1] if re.search(r"passed|failed", x)), "")
        return code == PASSED, f"unmutated: {summary}" + ("" if code == PASSED else f"\n{output}")
    code, output = run_tests(mutation.edits, mutation.file, [mutation.test])
    words = {PASSED: "SURVIVES", FAILED: "killed by"}.get(code, f"NOT TESTED (exit code {code}) by")
    tail = "" if code in (PASSED, FAILED) else f"\n{output}"
    return code == FAILED, f"mutation '{mutation.name}' {words} tests/{mutation.test}{tail}"


def main():
    processes = multiprocessing.get_context("forkserver")
    processes.set_forkserver_preload(LIBRARIES)
    good = True
    with processes.Pool(2, maxtasksperchild=1) as pool:
        trials = pool.imap(trial, [None, *MUTATIONS], chunksize=1)
        for _ in range(1 + len(MUTATIONS)):
            as_it_must_be, line = trials.next(timeout=300)
            good &= as_it_must_be
            print(line, flush=True)
    print(f"{len(MUTATIONS)} mutations: {'all killed' if good else 'NOT all killed'}")
    return 0 if good else 1


if __name__ == "__main__":
    sys.exit(main())
