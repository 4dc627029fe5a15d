"""Wrong versions of the code, and for each the test file that must notice.

    python tests/mutations.py [a part of a name]...

copies the project to a temporary folder for each mutation, replaces a snippet in one function and
runs the tests on the copy, of which one must fail; on an unmutated copy all must pass. A snippet is
found whatever its white space and trailing commas; one that is not there exactly once is an error.
Prints a line for each; exit status 1 if a mutation survives. 5 minutes on two cores: libraries are
imported once, in a process from which those of the trials are forked.
"""

import ast
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
PARTS = ("w2svd.py", "toy", "tests", "pyproject.toml", "README.md")
LIBRARIES = """pytest torch.func peft einops scipy.stats scipy.integrate tqdm safetensors.torch
    PIL.Image matplotlib.figure imageio.v3 diffusers.pipelines.hunyuan_video"""
PASSED, FAILED = 0, 1  # pytest's exit statuses; any other says that no test ran as it should

# A file of tests, then the mutations that it must notice, 'name @ where: old text ==> new text',
# where is a function of w2svd.py, or 'file:function'; a line that is indented goes on. What stands
# behind ' with ' is put into the environment of the tests
TABLE = r"""
# test_ranks.py -k two_processes with CASE=rollout, not split
gradients stay each process's own @ mean_over_ranks: RANKS > 1 and ==> RANKS > 9 and
gradients of processes are added up @ mean_over_ranks: x /= RANKS ==> x /= 1
every process draws the same noise @ StateOfRanks.__init__: 2**20 * self.rank ==> 0 * RANK
each process has exits of its own @ StateOfRanks.__init__: name != "exit" or ==> name or
processes go on with the first one's noise @ unpack: if shared else state.rank ==> if shared else 0
# test_ranks.py -k two_processes with CASE=full copies, split
what copies were is trained, not their parts @ split_over_ranks:
    roles.trained[role] = roles._find(role) ==> roles.trained[role] = roles.trained[role]
a copy keeps what it gathered under the average @ split_over_ranks:
    module is not roles.backbone.module ==> module is not backbone.module
# test_ranks.py -k each_clip
every process reads the same clips @ HunyuanTask.batches: taken + rank, ranks ==> taken, 1
# test_ranks.py -k two_processes with CASE=from a first image
processes of one video draw different noise @ StateOfRanks.__init__:
    2**20 * self.rank ==> 2**20 * RANK
gradients of a video's shares are averaged @ HunyuanVideo.share_tokens:
    exchange(x[:, :, None].expand(-1, -1, n, -1), 2, 1)[:, :, 0] ==>
    importlib.import_module("diffusers.hooks.context_parallel").AllGatherFunction.apply(x, 1, group)
a sample's gradient is that of a share @ HunyuanVideo.share_tokens:
    exchange(out[:, :, None], 1, 2).mean(2) ==> out.chunk(n, 1)[rank]
the first frame is looked for in every share @ HunyuanVideo.share_tokens:
    args[6] - rank * ==> args[6] - 0 *
adapters are split with the base @ split_over_ranks:
    ignored_params=adapters ==> ignored_params=set()
# test_flow_matching.py
the grid is shifted twice @ few_step_sigmas: , shift).float() ==> , shift * shift).float()
the losses' levels are shifted twice @ sample_sigma: , shift) ==> , shift**2)
the range of levels is taken of the shifted ones @ sample_sigma:
    shift_sigma(low + (high - low) * u, shift) ==> low + (high - low) * shift_sigma(u, shift)
sigma and 1 - sigma are swapped @ add_noise: x0 + sigma * eps ==> eps + sigma * x0
the velocity's sign is flipped @ x0_from_velocity: x_t - expand_as ==> x_t + expand_as
the score's sign is flipped @ score_from_velocity: return -(x_t ==> return (x_t
guidance is counted from 0 @ guided: v_uncond + w ==> v_cond + w
few-step sampling adds its first noise again @ few_step_sample: x0, fresh, ==> x0, noise,
few-step sampling ignores its generator @ few_step_sample: generator=rng, ==>
Euler steps go up the noise @ euler_sample: (sigma_next - sigma) ==> (sigma - sigma_next)
# test_losses.py
the DMD gradient's sign is flipped @ dmd_gradient: (x0_fake - x0_real) / ==> (x0_real - x0_fake) /
the normaliser is the fake's @ dmd_gradient: x_gen - x0_real ==> x_gen - x0_fake
the normaliser is that of the batch @ mean_abs: range(1, x.ndim) ==> range(0, x.ndim)
the normaliser has no floor @ mean_abs: .clamp_min(1e-6) ==>
half precision is subtracted in half precision @ at_least_float32:
    x.to(torch.promote_types(x.dtype, torch.float32)) ==> x
the GT gradient's sign is flipped @ gt_gradient: difference / ==> -difference /
the fake learns the reversed velocity @ fake_loss: eps - x_gen ==> x_gen - eps
# test_roles.py
alpha_weak and alpha_strong are swapped @ Roles.use:
    "fake": self.alpha_strong, "real" ==> "real": self.alpha_strong, "fake"
the real DiT reads the generator's adapter @ Roles._switch: = "fake" if ==> = "generator" if
the adapters' alpha is twice their rank @ Roles._switch: = scale ==> = 2 * scale
switching flips requires_grad, as peft's own does @ Roles._switch:
    _active_adapter = active ==> _active_adapter = active; active and layer.set_adapter(active)
blocks are recomputed outside their role @ Roles.checkpoint: self.use(role, alpha) ==> nullcontext()
the role before does not come back after an exception @ Roles.use:
    self._switch(*before) ==> sys.exc_info()[0] or self._switch(*before)
roles do not nest @ Roles.use: self._switch(*before) ==> self._switch(None, 0.0)
only the last adapter trains @ Roles.__init__: [role].values() ==> ["fake"].values()
the backbone is trained along @ Roles.__init__: (False) ==> (True)
the real DiT is the full fake @ Roles._velocity:
    .get(role, ==> .get("fake" if role == "real" else role,
the prefix of files is taken off ours alone @ Roles.load:
    theirs = {name.removeprefix("transformer.") ==> theirs = {name
the prefix of files is taken off theirs alone @ Roles.load:
    ours = {name.removeprefix("transformer.") ==> ours = {name
the real branch is left in the graph @ generator_step: torch.no_grad() ==> nullcontext()
# test_updates.py
the generator's gradient is a sum, not a mean @ generator_step: / g.numel() ==>
the real DiT keeps a little of the adapter at alpha_weak 0 @ Roles._velocity:
    self.use(role) ==> self.use(role, 1e-3 if role == "real" and not self.alpha_weak else None)
fake and real see different noise @ generator_step:
    real(x_t, sigma, cond) ==> real(x_t + eps, sigma, cond)
the guided real DiT keeps the condition @ generator_step: sigma, None ==> sigma, cond
the fake is trained at another strength @ fake_step: getattr(roles, role) ==> roles.real
a rollout takes one evaluation too many @ rollout_input: level + 1 ==> level + 2
a batch of paired inputs has one noise level @ paired_input: (len(x0),) ==> (1,)
non-finite values pass @ require_finite: if bad.any() ==> if False
motion is measured along the height @ moments: diff(dim=2) ==> diff(dim=3)
the average keeps 1 - decay @ State.update_average: 1 - ema ==> ema
# test_distil.py
the losses' noise comes from the input's stream @ losses_noise: rngs["noise"] ==> rngs["input"]
sigma_shift is ignored @ losses_noise: c.sigma_shift ==> 1.0
sigma_high is ignored @ losses_noise: c.sigma_high ==> 0.98
sigma_low is ignored @ losses_noise: c.sigma_low ==> 0.02
every fake update draws its own samples @ distil: k % config.reuse == 0 ==> True
the fake's samples are drawn once an iteration @ distil: k % config.reuse == 0 ==> k == 0
the average has no warm-up @ ema_at: min(config.ema, ==> max(config.ema,
rollouts are under the average @ generator_input:
    return rollout_input( ==> with state.averaged(): return rollout_input(
the learning rate is off by one @ distil: lr_scale(config, ==> lr_scale(config, 1 +
alpha_weak is off by one @ distil: alpha_weak_at(config, ==> alpha_weak_at(config, 1 +
alpha_weak falls until the end @ alpha_weak_at: 2 * iteration ==> iteration
the fake's warm-up is ignored @ distil: config.fake_warmup if ==> 0 if
the fake's warm-up comes in every iteration @ distil: if state.iteration == 0 ==> if True
the fake's samples are not final @ generated: cond, final) ==> cond)
the fake's samples are of another level @ generated: cond), sigma_in) ==> cond), sigma_in / 2)
the fake's update trains the generator @ fake_step: getattr(roles, role) ==> roles.generator
the generator is trained at the last exit only @ distil: x0, cond) ==> x0, cond, True)
the ground truth's weight is dropped @ distil: config.gt_weight * ==> 1.0 *
the GT loss skips everything but noise @ distil: sigma_in < 1 ==> sigma_in == 1
gt_skip_noise is dropped @ distil: not config.gt_skip_noise ==> True
guidance is dropped @ distil: config.guidance ==> 1
the average comes before the update @ distil:
    norm = state.update("generator", ==> state.update_average(); norm = state.update("generator",
the average follows every other step @ distil:
    state.update_average ==> state.iteration % 2 or state.update_average
the generator learns at the fake's rate @ distil: config.generator_lr ==> config.fake_lr
the fake has no weight decay @ State.__init__: config.fake_weight_decay ==> 0.0
the optimizers have momentum @ State.__init__: (0.0, 0.999) ==> (0.9, 0.999)
gradients are not clipped @ State.update: MAX_GRAD_NORM ==> 1e9
accumulated gradients are a sum @ State.update: /= self.config.accumulate ==> /= 1
a saved generator is not the average @ save_generator:
    state.average.items ==> state.roles.state("generator").items
the toy's pictures are on another grid @ toy/tasks.py:Task.on_log: self.sigmas ==> self.sigmas**2
the toy's samples ignore the header's grid @ toy/tasks.py:Task.sample:
    info["sigmas"] ==> [1.0, 0.5, 0.0]
# test_first_frame.py -k not run and not learns
the means do not follow the frame @ toy/mixtures.py:GivenFirstFrame._shift:
    return difference - ==> return 0 * difference - 0 *
the weights do not follow the frame @ toy/mixtures.py:GivenFirstFrame._log_weights:
    log_softmax(1) ==> mul(0).log_softmax(1)
the frame narrows no covariance @ toy/mixtures.py:GivenFirstFrame.__init__:
    torch.linalg.cholesky(C) ==> torch.eye(L.shape[2]).to(L)
samples do not follow the frame @ toy/mixtures.py:GivenFirstFrame.sample:
    + self._back ==> + 0 * self._back
the frame is behind @ toy/tasks.py:TokenReplace.inputs: [cond, x_t] ==> [x_t, cond]
every frame is said to be given @ toy/tasks.py:LatentConcat.inputs: mask[:, :, 0] ==> mask[:, :, :]
the frame is given everywhere @ toy/tasks.py:LatentConcat.inputs: frames[:, :, :1] ==> frames[:]
the sample's own first frame is kept @ toy/tasks.py:Task.whole: [cond, ==> [samples[:, :, :1],
# test_discriminator.py -k not density_ratio
the discriminator reads an adapter @ Discriminator.logit: use(None) ==> use("generator")
the generator's term has the wrong sign @ Discriminator.gradient: (-logit) ==> (logit)
the discriminator judges clean samples @ Discriminator.gradient: add_noise(x, eps, sigma) ==> x
R1 perturbs the clean sample @ discriminator_step: near = x_t + ==> near = x0 +
real and generated are exchanged @ discriminator_step: [-real, generated] ==> [real, -generated]
the discriminator's term is divided by numel too @ generator_step: gan_weight * ==>
    gan_weight / g.numel() *
the discriminator is not updated @ distil: state.update("discriminator", ==> (lambda *_: 0)(
LCM's target has a gradient @ consistency_step: torch.no_grad() ==> nullcontext()
LCM's target is the generator itself @ consistency_step: average( ==> roles.generator(
LCM steps with the generator @ consistency_step: roles.plain( ==> roles.generator(
LCM's levels are exchanged @ without_fake: grid[k], grid[k + 1], eps ==> grid[k + 1], grid[k], eps
regression starts from other noise @ without_fake: roles.plain, eps, ==> roles.plain, -eps,
regression reads less than pure noise @ without_fake: sigma.fill_(1) ==> sigma
fine-tuning learns noise @ without_fake: fake_step(roles, x0, ==> fake_step(roles, eps,
# test_first_image.py -k behind or sample_is or clip_has or stretched
the first frame comes last @ HunyuanVideo.with_image: [cond["image"].to(x_t), x_t] ==>
    [x_t, cond["image"].to(x_t)]
the mask of the first frame is empty @ HunyuanVideo.with_image:
    cond["image"], 1 ==> cond["image"], 0
the text did not see the picture @ encode_text: 4 if form == ==> 2 if form ==
the picture is stretched @ HunyuanTask.first_frame: "crop" ==> "default"
# test_hunyuan.py -k saves_work
attention is run again though it was kept @ HunyuanVideo.checkpoint_with: block in late ==> False
nothing is offloaded @ HunyuanVideo.checkpoint_with: if self.offload ==> if False
# test_hunyuan.py -k mask_reaches
the text's mask reaches attention @ HunyuanVideo.without_mask: None, *args ==> args[3], *args
# test_hunyuan.py -k bf16
timesteps are rounded to bf16 @ HunyuanVideo.velocity:
    1000 * sigma.float() ==> (1000 * sigma).to(self.dtype)
adapters compute in float32 @ HunyuanVideo.velocity: self.dtype != torch.float32 ==> False
# test_hunyuan.py -k embedded_guidance
embedded guidance is ignored by the backbone @ HunyuanVideo.velocity: self.guidance ==> 6.0
embedded guidance does not reach the backbone @ HunyuanVideo.__init__:
    config.embedded_guidance ==> 6.0
# test_data.py -k scaled_mode
latents are encoded unscaled @ encode_video: * pipe.vae.config.scaling_factor ==>
text is not trimmed @ encode_text: [:, mask[0].bool()] ==>
# test_hunyuan.py -k films_on
films are on another grid @ HunyuanTask.on_log: (steps, shift) ==> (steps, 5.0)
# test_hunyuan.py -k sample_is or seed_and or another_size or negative_prompt
latents are decoded unscaled @ HunyuanTask.decode: / pipe.vae.config.scaling_factor ==>
sample ignores the header's grid @ HunyuanTask.sample: info["sigmas"] ==> [1.0, 0.5, 0.0]
another number of steps is on another grid @ HunyuanTask.sample: info["shift"] ==> 5.0
the negative prompt is ignored @ HunyuanTask.sample: away if avoid else ==> student if avoid else
# test_hunyuan.py -k card_s_code
the exported scheduler forgets the shift @ export: shift=info["shift"] ==> shift=5.0
the exported scheduler adds no noise @ export: not info["euler"] ==> False
# test_hunyuan.py -k merged_weights
the merged weights are rounded first @ merge: for name, x in tensors.items() ==>
    for name, x in [(n, y.bfloat16().float()) for n, y in tensors.items()]
# test_hunyuan.py -k second_reader
fused layers are read at a third @ to_comfyui: len(A) ==> len(A) / 3
# test_clips.py -k colours or hdr or disc or fields or damaged or transparent
untagged films are bt601 @ read_clip: "setparams=colorspace=bt709," + chain ==> chain
HDR is not tone-mapped @ read_clip: chain += TONE_MAP ==> pass
pixels are taken for square @ read_clip: /sar ==>
fields stay fields @ read_clip: deint=interlaced ==> deint=interlaced:enable=0
damaged frames are used @ read_clip: -xerror -map ==> -map
what is transparent shows @ read_clip: premultiply=inplace=1 ==> null
# test_hunyuan.py -k each_clip_is
always clip 0 is read @ HunyuanTask.batches: permutation[place] ==> 0
every epoch has the same order @ HunyuanTask.batches: + epoch) ==> )
an epoch begins anew after a resume @ HunyuanTask.batches:
    count(taken + rank ==> count(taken - taken % len(self.clips) + rank
# test_hunyuan.py -k fused_layers
ComfyUI's fused layers are stacked in reverse @ to_comfyui: torch.cat(A) ==> torch.cat(A[::-1])
"""


class Mutation(NamedTuple):
    name: str
    file: str
    where: str
    old: str
    new: str
    tests: str  # arguments of pytest


def rows():
    tests = None
    for line in TABLE.replace("\n    ", " ").strip().splitlines():
        if line.startswith("# "):
            tests = line[2:]
            continue
        name, rest = line.split(" @ ")
        where, change = rest.split(": ", 1)
        file, _, function = where.rpartition(":")
        old, new = change.split("==>")
        yield Mutation(name, file or "w2svd.py", function, old.strip(), new.strip(), tests)


MUTATIONS = list(rows())


def mutate(source, where, old, new):
    """`source` with `new` for `old` in the function `where`, 'name' or 'Class.name'."""
    node = ast.parse(source)
    for name in where.split("."):
        (node,) = [n for n in node.body if getattr(n, "name", None) == name]
    first = node.body[1 if ast.get_docstring(node) else 0].lineno - 1
    lines, pattern = source.splitlines(keepends=True), []
    for token in re.findall(r"\w+|[^\w\s]", old):
        word = rf"\b{token}\b" if re.match(r"\w", token) else re.escape(token)
        pattern.append(rf",?\s*{word}" if token in ")]}" else word)
    inside = "".join(lines[first : node.end_lineno])
    changed, count = re.subn(r"\s*".join(pattern), lambda _: new, inside)
    if count != 1:
        raise ValueError(f"{where} has it {count} times, not once: {old}")
    return "".join([*lines[:first], changed, *lines[node.end_lineno :]])


def run_tests(mutation, tests):
    """Pytest's exit status and output for the tests, on a copy of the project with the mutation."""
    with tempfile.TemporaryDirectory() as folder:
        for part in PARTS:
            copy = shutil.copytree if (ROOT / part).is_dir() else shutil.copy
            copy(ROOT / part, Path(folder, part))
        if mutation:
            file = Path(folder, mutation.file)
            file.write_text(mutate(file.read_text(), mutation.where, mutation.old, mutation.new))
        os.chdir(folder)
        own = {str(ROOT), str(ROOT / "tests"), ""}  # the copy only, never the original
        sys.path[:] = [folder, *(path for path in sys.path if path not in own)]
        import pytest

        tests, _, setting = tests.partition(" with ")
        if setting:
            os.environ.update([setting.split("=")])
        output, (file, _, words) = io.StringIO(), tests.partition(" -k ")
        with contextlib.redirect_stdout(output), contextlib.redirect_stderr(output):
            how = ["-x", "-n", "0", "--disable-warnings", "-p", "no:cacheprovider"]
            code = pytest.main([*how, f"tests/{file}", "-k", words])
        loaded = Path(sys.modules["w2svd"].__file__)
        os.chdir(ROOT)
        if loaded != Path(folder, "w2svd.py"):
            raise RuntimeError(f"the tests ran on {loaded}")
        return int(code), output.getvalue()


def trial(mutation, tests):
    """(as it must be, one line); without a mutation all tests must pass."""
    code, output = run_tests(mutation, tests)
    if mutation is None:
        good, words = code == PASSED, f"unmutated: {tests} {'pass' if code == PASSED else 'FAIL'}"
    else:
        good, words = code == FAILED, f"{mutation.name}: SURVIVES {tests}"
        if code == FAILED:
            test = re.search(r"^FAILED tests/(.+?)( - |$)", output, re.M)[1]
            words = f"{mutation.name}: killed by {test}"
        elif code != PASSED:
            words = f"{mutation.name}: NOT TESTED, exit status {code} of {tests}"
    return good, words + ("" if code in (PASSED, FAILED) and good else f"\n{output[-2000:]}")


def main(parts):
    chosen = [m for m in MUTATIONS if not parts or any(part in m.name for part in parts)]
    # the same tests with several processes are long, and run unmutated by default
    files = sorted({m.tests for m in chosen if " with " not in m.tests})
    trials = [(None, tests) for tests in files]
    trials += [(m, m.tests) for m in chosen]
    processes = multiprocessing.get_context("forkserver")
    processes.set_forkserver_preload(LIBRARIES.split())
    good = bool(chosen)
    with processes.Pool(3, maxtasksperchild=1) as pool:  # some wait for processes of their own
        for result in [pool.apply_async(trial, args) for args in trials]:
            as_it_must_be, line = result.get(timeout=900)
            good &= as_it_must_be
            print(line, flush=True)
    print(f"{len(chosen)} mutations: {'all killed' if good else 'NOT all killed'}")
    return 0 if good else 1


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
