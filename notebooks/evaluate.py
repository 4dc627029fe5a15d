"""A run of a video model against its backbone and real clips: a table, a film for each prompt.

    python notebooks/evaluate.py --run runs/mine --data my_clips/ --n 16 [--out --seed --at ...]

The same prompts, the clips' captions, and the same noise for every method: the backbone by Euler
in the student's number of steps, on the student's grid and on that of the released shift, and in
the released number of steps; the student on its own grid. Text and latents come from the clips'
files, which `encode` makes; then the transformer is in memory alone, then the VAE. In the
evaluation's folder: a folder of films for each method, named as VBench's custom input reads them;
together.mp4, all beside each other; evaluation.json. The numbers are of frames before they are
compressed to .mp4.

| column            | what; a ratio is to the data's, and 1 like the data                        |
|-------------------|----------------------------------------------------------------------------|
| NFE               | evaluations of the transformer for a video                                 |
| seconds           | for a video, the transformer alone: the median                             |
| frechet           | squared Frechet distance of latents, in the data's leading directions and  |
|                   | the length of the rest, over the data's variance there; the data's row: of |
|                   | some clips to the others                                                   |
| dynamic_degree    | ratio of the mean absolute change of a pixel between frames; 0 for stills  |
| motion_smoothness | the data's mean absolute second difference of a pixel over the samples'    |
| flicker           | ratio of that second difference, of the brightness of tiles of 16 x 16     |
| sharpness         | ratio of the mean absolute difference of neighbouring pixels               |

The data's frames are their latents, decoded: the VAE's own blur counts against nobody. No number
sees meaning: a sharp video of the wrong thing, or noise in place of detail, may come near to 1.
Clips that the student was trained on flatter it: keep some apart.
"""

import dataclasses
import re
import statistics
import sys
import time
from pathlib import Path

import imageio.v2
import numpy as np
from PIL import Image, ImageDraw, ImageFont
from tqdm import tqdm

sys.path[:0] = map(str, Path(__file__).resolve().parents[:2])  # from wherever it is called

from wan import Wan  # noqa: E402

import w2svd  # noqa: E402
from toy.metrics import distances, motion  # noqa: E402
from w2svd import BT709, Refused, atomic_write, torch, write_film  # noqa: E402

MODELS = {**w2svd.MODELS, "wan": Wan}
RELEASED = {"hunyuan": (28, 7.0), "wan": (50, 3.0)}  # steps and shift of the released pipelines
REFERENCE = 256  # clips at most, whose moments are the data's
SHOWN = "frechet", "dynamic_degree", "motion_smoothness", "flicker", "sharpness"
ABOUT = """seconds: without decoding, {decoding_seconds:.2f} more. frechet: {directions} leading \
directions of {clips} clips' latents,
{share_of_variance:.0%} of their variance, and the length of the rest. The data's: {held_out} \
clips to the others; less than that
says nothing. {estimated} numbers are estimated from {videos} videos: a first look; published \
FVDs take about 2,000."""


# ---- numbers -------------------------------------------------------------------------------------


def compare(data, latents):
    """The distances of each method's latents (n, D) from the data's (m, D), {method: float}.

    And what they rest on. The data's own: some clips to the others, the mean of five draws.
    """
    n = min(len(x) for x in latents.values())
    k, size, rng = min(max(n // 8, 1), 64), min(n, len(data) // 2), torch.Generator().manual_seed(0)
    orders = [torch.randperm(len(data), generator=rng) for _ in range(5)]
    own = [distances(data[i[size:]], [data[i[:size]]], k)[0][0] for i in orders]
    found, share = distances(data, latents.values(), k)
    about = {"directions": k, "share_of_variance": share, "clips": len(data), "videos": n}
    about |= {"held_out": size, "estimated": (k + 1) * (k + 4) // 2}  # a mean and a covariance
    return {"data": statistics.fmean(own), **dict(zip(latents, found))}, about


def measure(frames):
    """The four pixel numbers of the table, absolute, of frames (T, H, W, 3) in [0, 1]."""
    film = torch.as_tensor(frames).float().permute(3, 0, 1, 2)[None]  # (1, 3, T, H, W)
    change, second = motion(film)
    tiles = torch.nn.functional.avg_pool3d(film.mean(1, keepdim=True), (1, 16, 16))
    edges = [film.diff(dim=dim).abs().mean().item() for dim in (3, 4)]
    numbers = {"dynamic_degree": change, "motion_smoothness": second}
    return numbers | {"flicker": motion(tiles)[1], "sharpness": sum(edges) / 2}


def against(films, data):
    """Means of measure() over films, as ratios to the data's; of smoothness the other way round."""
    mine, theirs = (
        {name: max(statistics.fmean(film[name] for film in films), 1e-6) for name in films[0]}
        for films in (films, data)
    )
    ratios = {name: mine[name] / theirs[name] for name in mine}
    return ratios | {"motion_smoothness": 1 / ratios["motion_smoothness"]}


def table(result):
    """Lines of text from evaluation.json, in the form of the toy's table, and how to read them."""
    widths = [len(name) + 2 for name in SHOWN]
    head = "".join(f"{name:>{width}}" for name, width in zip(SHOWN, widths))
    lines = [f"{'method':17}{'NFE':>3}{'seconds':>9}" + head]
    for name, row in result["methods"].items():
        cells = "".join(f"{row[c]:>{width}.3f}" for c, width in zip(SHOWN, widths))
        lines.append(f"{name:17}{row['nfe']:>3}{row['seconds']:>9.2f}" + cells)
    return "\n".join([*lines, ABOUT.format(**result["frechet"], **result)])


# ---- videos --------------------------------------------------------------------------------------


def grids(info):
    """{method: noise levels}: the backbone's by Euler, then the student's own."""
    own, released = len(info["sigmas"]) - 1, RELEASED[info["model"]]
    runs = dict.fromkeys([(own, float(info["shift"])), (own, released[1]), released])
    euler = {f"euler-{n}-shift-{shift:g}": w2svd.few_step_sigmas(n, shift) for n, shift in runs}
    return euler | {f"student-{own}": torch.tensor(info["sigmas"])}


def draw(task, files, levels, generator, seeds):
    """{method: latents (n, C, T, H, W)} on the CPU, and {method: seconds for one}.

    Each is the video that `w2svd.py sample` draws of its prompt with its seed. The task's backbone
    has its weights here alone.
    """
    outline = task.backbone
    task.backbone = model = outline.load()
    student, renoise = task.student(*generator), generator[1]["renoise"]
    latents, seconds, bar = {}, {}, tqdm(total=len(levels) * len(files), desc="draw", unit="video")
    for name, sigmas in levels.items():
        plain, drawn, spent = name.startswith("euler"), [], []
        sampler = w2svd.few_step_sample if renoise and not plain else w2svd.euler_sample
        for file, seed in zip(files, seeds):
            cond, start = task.read(file)["cond"], time.perf_counter()
            velocity = model.velocity if plain else student
            x0 = model.draw(sampler, velocity, sigmas, cond, seed)
            drawn.append(x0[0].cpu())  # which waits for the GPU
            spent.append(time.perf_counter() - start)
            if not drawn[-1].isfinite().all():
                raise Refused(f"A video of {name}, seed {seed}, is not finite; nothing is written.")
            bar.update()
        latents[name], seconds[name] = torch.stack(drawn), statistics.median(spent)
    bar.close()
    task.backbone = outline
    return latents, seconds


def pages(films):
    """Films {name: frames (T, H, W, 3), bytes} three in a row, each under its name: (T, .., 3)."""
    (T, H, W, _), parts = next(iter(films.values())).shape, []
    strip = 16 * max(1, H // 240)  # ffmpeg likes multiples of 16
    for name, frames in films.items():
        label = Image.new("RGB", (W, strip), "white")
        font = ImageFont.load_default(size=min(0.7 * strip, 1.7 * W / len(name)))
        ImageDraw.Draw(label).text((W / 2, strip / 2), name, "black", font, anchor="mm")
        label = np.broadcast_to(np.asarray(label), (T, strip, W, 3))
        parts.append(np.concatenate([label, frames], axis=1))
    across = min(3, len(parts))
    parts += [np.full_like(parts[0], 255)] * (-len(parts) % across)
    rows = [np.concatenate(parts[i : i + across], 2) for i in range(0, len(parts), across)]
    return np.concatenate(rows, axis=1)


def films(task, captions, latents, out):
    """Decode everything and write the films; {method: [measure() of each]}, seconds to decode one.

    latents: {method: (n, C, T, H, W)}, in the order of the captions.
    """
    config = task.config
    pipe = w2svd.load_pipeline(config.checkpoint, ("vae",))
    numbers, spent = {name: [] for name in latents}, []
    for name in latents:
        (out / name).mkdir(parents=True)
    how = {"format": "FFMPEG", "fps": config.fps, "output_params": BT709}
    together = out / "together.mp4"
    with atomic_write(together) as part, imageio.v2.get_writer(part, **how) as beside:
        for i, caption in enumerate(tqdm(captions, desc="decode", unit="prompt")):
            words = re.sub(r"[^\w ,.']+", " ", caption).encode()[:180]  # file systems count bytes
            name_of_film = f"{words.decode(errors='ignore').strip(' .')}-{i}.mp4"
            start = time.perf_counter()
            shown = {n: task.backbone.decode(pipe, x0[i : i + 1]) for n, x0 in latents.items()}
            spent.append((time.perf_counter() - start) / len(shown))
            for name, frames in shown.items():
                numbers[name].append(measure(frames))
                shown[name] = write_film(out / name / name_of_film, frames, config.fps)
            for page in pages(shown):
                beside.append_data(page)
    return numbers, statistics.median(spent)


# ---- the command ---------------------------------------------------------------------------------


def prepare(run, data, n, out, seed, checkpoint):
    """The run's task with these clips; what cannot be done is refused."""
    config = w2svd.read_run(run)
    if config.model == "toy":
        raise Refused(f"{run} is a run of --model toy; its result.json has its numbers.")
    if Path(data).is_file():
        raise Refused(f"--data {data} has no clips to compare with: name a folder of them.")
    if n < 4 or not 0 <= seed < 2**32:
        raise Refused(f"--n must be at least 4 and --seed not negative, not {n} and {seed}.")
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise Refused(f"{out} is in use: name another --out.")
    checkpoint = checkpoint or config.checkpoint
    config = dataclasses.replace(config, data=str(Path(data).resolve()), checkpoint=checkpoint)
    task = w2svd.load_task(config, MODELS)
    if w2svd.device() == "cpu" and task.backbone.module.num_parameters() > 1e9:
        raise Refused("A model of this size needs a GPU and torch finds none.")
    return task


def choose(task, n, seed):
    """The clips' files in an order drawn by the seed, and how many of the first are evaluated."""
    files = w2svd.encoded_clips(task.config, task.backbone)
    if len(files) < 4:
        raise Refused(f"{len(files)} clips are too few: at least 4 are needed, better hundreds.")
    if n > len(files):
        print(f"--n {n}: {task.config.data} has {len(files)} clips, which are all used")
    order = torch.randperm(len(files), generator=torch.Generator().manual_seed(seed))
    return [files[i] for i in order[: max(n, REFERENCE)]], min(n, len(files))


def evaluate(run, data, n=16, out="", seed=0, at=None, checkpoint=""):
    """Draw, decode, compare and write; returns what evaluation.json holds."""
    from diffusers.training_utils import free_memory

    out = Path(out or Path(run) / "evaluation")
    task = prepare(run, data, n, out, seed, checkpoint)
    config, generator = task.config, w2svd.read_generator(run, at)
    files, n = choose(task, n, seed)
    real = torch.stack([w2svd.read_safetensors(file)[0]["latents"] for file in files])
    captions = [task.read(file)["caption"] for file in files[:n]]
    levels, seeds = grids(generator[1]), [1_000_003 * seed + i for i in range(n)]
    latents, seconds = draw(task, files[:n], levels, generator, seeds)
    free_memory()  # before the VAE comes
    apart, about = compare(real.flatten(1), {name: x.flatten(1) for name, x in latents.items()})
    numbers, decoding = films(task, captions, {"data": real[:n], **latents}, out)
    rows = {"data": {"nfe": 0, "seconds": 0.0}}
    for name, sigmas in levels.items():
        twice = name.startswith("euler") and config.guidance != 1  # guidance: two for a step
        nfe = (len(sigmas) - 1) * (2 if twice else 1)
        rows[name] = {"nfe": nfe, "seconds": seconds[name]}
    for name, row in rows.items():
        row.update(frechet=apart[name], **against(numbers[name], numbers["data"]))
    result = {"methods": rows, "decoding_seconds": decoding, "frechet": about, "prompts": captions}
    for name in ("height", "width", "frames", "fps", "data"):
        result[name] = getattr(config, name)
    result.update(run=str(run), step=generator[1]["step"], seed=seed, seeds=seeds)
    result.update(sigmas={name: sigmas.tolist() for name, sigmas in levels.items()})
    on_gpu = w2svd.device() == "cuda"
    result.update(device=torch.cuda.get_device_name() if on_gpu else "cpu", **w2svd.made_by())
    w2svd.write_json(out / "evaluation.json", result)
    return result


def main(argv=None):
    about = {"description": __doc__.split("\n")[0], "allow_abbrev": False}
    parser = w2svd.Parser(prog="evaluate.py", **about)
    for name, kind, default, text in (
        ("run", str, None, "a run folder, not the toy's"),
        ("data", str, None, "a folder of clips, read as train reads it"),
        ("n", int, 16, "prompts [16]"),
        ("out", str, "", "a new folder [RUN/evaluation]"),
        ("seed", int, 0, "of the choice of clips and the noise [0]"),
        ("at", int, None, "the generator of that iteration [the newest]"),
        ("checkpoint", str, "", "where the backbone lies now [as trained]"),
    ):
        how = {"type": kind, "default": default, "required": name in ("run", "data")}
        parser.add_argument(f"--{name}", help=text, **how)
    try:
        print(table(evaluate(**vars(parser.parse_args(argv)))))
        return 0
    except Refused as error:
        reason, status = error, error.status
    except (OSError, torch.OutOfMemoryError) as error:
        reason, status = str(error).splitlines()[0], 2
    print(f"w2svd: {reason}", file=sys.stderr)
    return status


if __name__ == "__main__":
    sys.exit(main())
