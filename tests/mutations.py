"""Wrong versions of the code, and for each the test file that must notice.

    python tests/mutations.py [a part of a name or of its file of tests]...

copies the project to a temporary folder for each mutation, replaces a snippet in one function and
runs the tests on the copy, of which one must fail; on an unmutated copy all must pass. A snippet is
found whatever its white space and trailing commas; one that is not there exactly once is an error.
Exit status 1 if a mutation survives. 6 minutes on two cores: libraries are imported but once.
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
PARTS = ("w2svd.py", "toy", "notebooks", "tests", "pyproject.toml", "README.md")
LIBRARIES = """pytest torch.func peft einops scipy.stats scipy.integrate tqdm safetensors.torch
    PIL.Image matplotlib.figure imageio.v3 diffusers.pipelines.hunyuan_video"""
PASSED, FAILED = 0, 1  # pytest's exit statuses; any other says that no test ran as it should

# A file of tests, then the mutations that it must notice, 'name @ where: old text ==> new text',
# where is a function of w2svd.py, or 'file:function'; a line that is indented goes on
TABLE = r"""
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
half precision is subtracted in half precision @ at_least_float32: torch.float32 ==> x.dtype
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
blocks are recomputed at the alpha of then @ Roles.checkpoint: use(role, alpha) ==> use(role)
the role before does not come back after an exception @ Roles.use:
    self._switch(*before) ==> sys.exc_info()[0] or self._switch(*before)
roles do not nest @ Roles.use: self._switch(*before) ==> self._switch(None, 0.0)
only the last adapter trains @ Roles.__init__: [role].values() ==> ["fake"].values()
the backbone is trained along @ Roles.__init__: (False) ==> (True)
the real DiT is the full fake @ Roles._velocity: get(role ==> get("fake" if role == "real" else role
the prefix of files is taken off ours alone @ Roles.load:
    theirs = {name.removeprefix("transformer.") ==> theirs = {name
the prefix of files is taken off theirs alone @ Roles.load:
    ours = {name.removeprefix("transformer.") ==> ours = {name
# test_updates.py
the generator's gradient is a sum, not a mean @ generator_step: / g.numel() ==>
the real DiT keeps a little of the adapter at alpha_weak 0 @ Roles._velocity:
    self.use(role) ==> self.use(role, 1e-3 if role == "real" and not self.alpha_weak else None)
fake and real see different noise @ generator_step: = roles.real(x_t ==> = roles.real(x_t + eps
the guided real DiT keeps the condition @ generator_step: unconditional(cond) ==> cond
non-finite values pass @ require_finite: if bad.any() ==> if False
the average is not exchanged back @ State.averaged: finally: exchange() ==> finally: pass
# test_distil.py
a rollout takes one evaluation too many @ rollout_input: level + 1 ==> level + 2
a batch of paired inputs has one noise level @ paired_input: (len(x0),) ==> (1,)
motion is measured along the height @ moments: diff(dim=2) ==> diff(dim=3)
the average keeps 1 - decay @ State.update_average: 1 - ema ==> ema
streams are the same in every iteration @ State.seed_streams: self.iteration, own ==> 0, own
streams are the same in every process @ State.seed_streams: iteration, own ==> iteration, 0
streams are the same for every purpose @ State.seed_streams: own, purpose) ==> own, "noise")
streams do not follow the seed @ State.seed_streams: self.config.seed ==> 0
a rollout's exit is each process's own @ State.seed_streams: if shared else ==> if False else
a paired exit is shared @ State.seed_streams: and self.config.generator_input == "rollout" ==>
streams are seeded once @ distil: state.seed_streams ==> state.iteration or state.seed_streams
seeds have 31 bits @ stream_seed: >> 1 ==> >> 33
gradients are a sum over the processes @ average_gradients: * ranks() ==> * 1
gradients stay each process's own @ average_gradients: ranks() == 1 ==> True
accumulated gradients are a sum @ average_gradients: parameter.grad /= forwards ==> pass
accumulated gradients are a sum, where there are processes @ average_gradients: (forwards * ==> (1 *
the loss's noise comes from the input's stream @ draw_noise: rngs["noise"] ==> rngs["input"]
sigma_shift is ignored @ draw_noise: config.sigma_shift ==> 1.0
sigma_high is ignored @ draw_noise: config.sigma_high ==> 0.98
sigma_low is ignored @ draw_noise: config.sigma_low ==> 0.02
every fake update draws its own samples @ distil: k % config.reuse == 0 ==> True
the fake's samples are drawn once an iteration @ distil: k % config.reuse == 0 ==> k == 0
the average has no warm-up @ ema_at: min(config.ema, ==> max(config.ema,
rollouts are under the average @ draw_input:
    return rollout_input( ==> with state.averaged(): return rollout_input(
the learning rate is off by one @ distil: lr_scale(config, ==> lr_scale(config, 1 +
alpha_weak is off by one @ distil: alpha_weak_at(config, ==> alpha_weak_at(config, 1 +
alpha_weak falls until the end @ alpha_weak_at: 2 * iteration ==> iteration
the fake's warm-up is ignored @ distil: config.fake_warmup if ==> 0 if
the fake's warm-up comes in every iteration @ distil: if state.iteration == 0 ==> if True
the fake's samples are not final @ distil: cond, final) ==> cond)
the fake's samples are of another level @ distil: v, sigma_in), ==> v, sigma_in / 2),
the fake is trained at another strength @ fake_step: roles.fake( ==> roles.real(
the fake's update trains the generator @ fake_step: roles.fake( ==> roles.generator(
the generator is trained at the last exit only @ distil:
    x0, cond) sigma, eps = draw_noise(config, state, name, x0) ==>
    x0, cond, True); sigma, eps = draw_noise(config, state, name, x0)
the ground truth's weight is dropped @ distil: gt_weight=config.gt_weight ==> gt_weight=1.0
guidance is dropped @ distil: config.guidance ==> 1
the average comes before the update @ distil: norm = ==> state.update_average(); norm =
the average skips steps @ distil: update_average ==> iteration % 2 or state.update_average
the generator learns at the fake's rate @ distil: config.generator_lr ==> config.fake_lr
the fake has no weight decay @ State.__init__: config.fake_weight_decay ==> 0.0
the optimizers have momentum @ State.__init__: (0.0, 0.999) ==> (0.9, 0.999)
a spike is not cut @ State.update: SPIKE * usual_norm ==> 1e9 * usual_norm
std_ratio and motion_ratio are upside down @ log_line:
    line[f"gen_{name}"] / line[f"data_{name}"] ==> line[f"data_{name}"] / line[f"gen_{name}"]
a saved generator is not the average @ Run.save_generator:
    self.state.average.items ==> self.state.roles.state("generator").items
the toy's pictures are on another grid @ toy/tasks.py:Task.on_log: self.sigmas ==> self.sigmas**2
the toy samples on another grid @ toy/tasks.py:Task.sample: info["sigmas"] ==> [1.0, 0.5, 0.0]
Euler's grid is the worst @ toy/tasks.py:Task.best_shift: min( ==> max(
# test_faults.py -k not_finite
the reads of the update before are named too @ State.update: self.reads = [] ==> pass
# test_train.py -k cut_off_between
Adam's square is not kept @ held_tensors: adam.items() ==> adam.items() if slot != "exp_avg_sq"
a checkpoint lacks the average @ held_tensors: state.average.items() ==> {}.items()
a checkpoint lacks the fake @ held_tensors: held[f"{role}/{name}"] = ==> held[f"generator/{name}"] =
# test_discriminator.py -k not density_ratio
the real branch is left in the graph @ generator_step: torch.no_grad() ==> nullcontext()
the discriminator reads an adapter @ Discriminator.logit: use(None) ==> use("generator")
the generator's term has the wrong sign @ Discriminator.gradient: (-logit) ==> (logit)
the discriminator judges clean samples @ Discriminator.gradient: add_noise(x, eps, sigma) ==> x
real and generated are exchanged @ discriminator_step:
    softplus(-real).mean() + softplus(generated) ==> softplus(real).mean() + softplus(-generated)
the discriminator's term is divided too @ generator_step: gan_weight * ==> gan_weight / g.numel() *
the discriminator is not updated @ distil: state.update("discriminator", ==> (lambda *_: 0)(
# test_first_frame.py -k not run and not learns and not readme
means ignore the frame @ toy/mixtures.py:GivenFirstFrame._shift:
    difference - ==> 0 * difference - 0 *
weights ignore the frame @ toy/mixtures.py:GivenFirstFrame._log_weights:
    log_softmax(1) ==> mul(0).log_softmax(1)
the frame narrows no covariance @ toy/mixtures.py:GivenFirstFrame.__init__:
    torch.linalg.cholesky(C) ==> torch.eye(L.shape[2]).to(L)
samples ignore the frame @ toy/mixtures.py:GivenFirstFrame.sample: self._back ==> 0 * self._back
the frame is behind @ toy/tasks.py:TokenReplace.inputs: [cond, x_t] ==> [x_t, cond]
every frame is said to be given @ toy/tasks.py:LatentConcat.inputs: mask[:, :, 0] ==> mask[:, :, :]
the frame is given everywhere @ toy/tasks.py:LatentConcat.inputs: frames[:, :, :1] ==> frames[:]
the sample's own first frame is kept @ toy/tasks.py:Task.whole: [cond, ==> [samples[:, :, :1],
# test_baselines.py -k autograd or neighbours or flow_matching
LCM's target learns @ toy/baselines.py:consistency_step: torch.no_grad() ==> w2svd.nullcontext()
LCM's target is the generator @ toy/baselines.py:consistency_step: average( ==> roles.generator(
LCM steps with the generator @ toy/baselines.py:consistency_step: roles.plain( ==> roles.generator(
LCM's levels are exchanged @ toy/baselines.py:lcm: grid[k], grid[k + 1] ==> grid[k + 1], grid[k]
regression has other noise @ toy/baselines.py:regress: roles.plain, eps ==> roles.plain, -eps
regression reads less than pure noise @ toy/baselines.py:regress: torch.ones ==> 0.9 * torch.ones
fine-tuning learns noise @ toy/baselines.py:finetune: roles, x0 ==> roles, eps
# test_numbers.py
Adam's epsilon is the usual one @ State.__init__: "eps": 1e-15 ==> "eps": 1e-8
the usual norm forgets how few updates there were @ usual_norm: ** known[0]["step"] ==> ** 1e9
the stream between the blocks is in bf16 @ VideoModel.stream_in_float32: out.float() ==> out
the last layer is in bf16 @ VideoModel.head_in_float32: torch.is_grad_enabled() ==> True
the floor's adapter stays @ gap_floor: parameter.zero_() ==> pass
the floor is of one role @ gap_floor: roles.fake, roles.real ==> roles.fake, roles.fake
# test_hunyuan.py -k features or velocity_is or mask_reaches or bf16
the given frame is shown to the discriminator @ VideoModel.features: [:, -tokens:] ==> [:]
the given frame is read in place of the last @ VideoModel.features: [:, -tokens:] ==> [:, :tokens]
embedded guidance is ignored by the backbone @ HunyuanVideo.velocity: self.guidance ==> 6.0
embedded guidance is not handed on @ HunyuanVideo.__init__: config.embedded_guidance ==> 6.0
the text's mask reaches attention @ HunyuanVideo.without_mask: None, *args ==> args[3], *args
timesteps are in bf16 @ HunyuanVideo.velocity:
    1000 * sigma.float() ==> (1000 * sigma).to(self.dtype)
adapters compute in float32 @ VideoModel.autocast: self.dtype != torch.float32 ==> False
# test_hunyuan.py -k checkpointing_and_offload
nothing is offloaded @ Roles.checkpoint: if self.offload ==> if False
a block is read from where it waited @ HostedBackbone.begin: self.put(i, self.here[i]) ==> pass
blocks that came stay @ HostedBackbone.begin: keys() - {i, ahead} ==> keys() & set()
# test_hunyuan.py -k flops or forwards or disk
the plan's hours are minutes @ time_plan: saves)) / 3600 ==> saves)) / 60
the plan's clips are those of the fake @ plan: c.batch * c.accumulate * ranks(), ==> c.fake_updates,
the plan's disk holds two checkpoints @ plan: 13 * generator + 9 * fake ==> 9 * generator + 6 * fake
the plan's rollouts all end at the last exit @ evaluations: (c.steps - 1) / 2 ==> (c.steps - 1)
# test_hunyuan.py -k films_are
films are on another grid @ VideoTask.on_log: (c.steps, c.shift) ==> (c.steps, 5.0)
the backbone's film is the student's @ VideoTask.on_log: model.velocity ==> generator
# test_hunyuan.py -k scaled_mode
latents are encoded unscaled @ VideoModel.encode_video: * scale ==>
text is not trimmed @ HunyuanVideo.encode_text: [:, mask[0].bool()] ==>
the text did not see the picture @ HunyuanVideo.encode_text: 4 if self.form == ==> 2 if self.form ==
# test_hunyuan.py -k sample_draws
the first frame comes last @ HunyuanVideo.with_image: [cond["image"].to(x_t), x_t] ==>
    [x_t, cond["image"].to(x_t)]
the first frame's mask is empty @ HunyuanVideo.with_image: cond["image"], 1 ==> cond["image"], 0
latents are decoded unscaled @ VideoModel.decode: / scale ==>
sample ignores the header's grid @ VideoTask.sample: info["sigmas"] ==> [1.0, 0.5, 0.0]
the exported scheduler forgets the shift @ export: shift=info["shift"] ==> shift=5.0
the exported scheduler adds no noise @ export: info["renoise"] ==> False
the picture is stretched @ VideoTask.first_frame: "crop" ==> "default"
# test_comfyui.py
fused layers are reversed @ notebooks/to_comfyui.py:convert: torch.cat(A) ==> torch.cat(A[::-1])
fused layers are at a third @ notebooks/to_comfyui.py:convert: len(stacked) ==> len(stacked) / 3
the workflow is on another grid @ notebooks/to_comfyui.py:workflow: about["shift"] ==> 5.0
# test_wan.py -k guided_update
Wan's levels are not in thousands @ notebooks/wan.py:Wan.velocity: 1000 * sigma ==> sigma
the mask of Wan's first frame is empty @ notebooks/wan.py:Wan.with_image: mask[:, :, 0] = 1 ==>
Wan's mask is behind the picture @ notebooks/wan.py:Wan.with_image:
    mask, cond["image"].to(x_t) ==> cond["image"].to(x_t), mask
# test_wan.py -k clip_s_file
Wan's text has 226 tokens @ notebooks/wan.py:Wan.encode_text: self.text_limit ==> 226
Wan's latents keep their mean @ notebooks/wan.py:Wan.scaling: return mean ==> return 0 * mean
the frames behind Wan's picture are black @ notebooks/wan.py:Wan.encode_text:
    [first, grey] ==> [first, grey - 1]
# test_wan.py -k bf16
Wan's noise level is embedded in bf16 @ notebooks/wan.py:Wan.time_in_float32:
    enabled=False ==> dtype=torch.bfloat16
# test_wan.py -k features
Wan's discriminator reads the last block @ notebooks/wan.py:Wan.__init__: blocks // 3 # ==> blocks #
# test_wan.py -k film_is
the backbone is filmed without guidance @ notebooks/wan.py:Wan.guided_velocity: w == 1 ==> w
# test_wan.py -k card
Wan's student is exported with guidance @ notebooks/wan.py:Wan.__init__: guidance = 1.0 ==>
    guidance = 5.0
the card leaves the grid to the pipeline @ export: CARD.format ==>
    CARD.replace("    pipe.scheduler.set_t", "    # pipe.scheduler.set_t").format
# test_clips.py -k colours or hdr or disc or fields or damaged or transparent
untagged films are bt601 @ read_clip: "setparams=colorspace=bt709," + chain ==> chain
HDR is not tone-mapped @ read_clip: chain += TONE_MAP ==> pass
pixels are taken for square @ read_clip: /sar ==>
fields stay fields @ read_clip: deint=interlaced ==> deint=interlaced:enable=0
damaged frames are used @ read_clip: -xerror -map ==> -map
what is transparent shows @ read_clip: premultiply=inplace=1 ==> null
# test_ranks.py -k each_clip
every process reads the same clips @ VideoTask.batches: taken + rank, ranks ==> taken, 1
always clip 0 is read @ VideoTask.in_order: order[count % n] ==> 0
every epoch has the same order @ VideoTask.in_order: seed, epoch, 0 ==> seed, 0, 0
an epoch begins anew after a resume @ VideoTask.in_order: count(first, ==> count(first - first % n,
# test_ranks.py -k processes_train_as
of two processes each keeps its gradients @ average_gradients: torch.distributed.all_reduce ==> abs
adapters are split too @ shard_backbone: ignored_params=trained ==> ignored_params=set()
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
    failed = re.search(r"^FAILED tests/(.+?)( - |$)", output, re.M)
    if mutation is None:
        good, words = code == PASSED, f"unmutated: {tests} {'pass' if code == PASSED else 'FAIL'}"
    elif code == FAILED:
        good, words = True, f"{mutation.name}: killed by {failed[1]}"
    else:
        good, words = False, f"{mutation.name}: SURVIVES {tests}, exit status {code}"
    return good, words if good else f"{words}\n{output[-2000:]}"


def main(parts):
    chosen = [m for m in MUTATIONS if not parts or any(p in f"{m.name} {m.tests}" for p in parts)]
    trials = [(None, tests) for tests in sorted({m.tests for m in chosen})]
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
