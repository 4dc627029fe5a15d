"""What the tests of video models share: settings of seconds, films watched, a card's code run."""

from pathlib import Path

import torch
from diffusers.schedulers import scheduling_flow_match_euler_discrete as scheduling
from diffusers.utils.torch_utils import randn_tensor

from w2svd import VideoTask

# rates at which a few steps show; and no default where a default could hide that it is ignored
SMALL = "--generator-lr .02 --fake-lr .02 --ema .5 --shift 4 --embedded-guidance 3".split()
SMALL += "--lora-rank 2 --fake-updates 2 --log-every 2 --save-every 2".split()


def watch_films(monkeypatch):
    """{name: latents} of the films to come, in order."""
    films, film = {}, VideoTask.film

    def watched(task, latents):
        films.update({path.name: x0 for path, x0 in latents.items()})
        film(task, latents)

    monkeypatch.setattr(VideoTask, "film", watched)
    return films


def run_card(folder, monkeypatch, checkpoint, **given):
    """Run the code of an exported folder's card on the CPU: the pipeline, latents and frames.

    Noise and the scheduler's renoising come from one stream of seed 0, as those of `sample` do.
    given: more arguments of the pipeline's call.
    """
    rng, found = torch.Generator(), []

    def draw(shape, **how):
        return randn_tensor(shape, **{**how, "generator": rng})

    monkeypatch.setattr(scheduling, "randn_tensor", draw)
    card = (Path(folder) / "README.md").read_text().splitlines()
    code = "\n".join(x[4:] for x in card if x.startswith("    ") and "export_to_video(" not in x)
    for old, new in {
        '"a woman talks"': '"a dog", output_type=output, **given',
        "torch.Generator().manual_seed(0)": "rng.manual_seed(0)",
        "this folder": str(folder),
        f'"{Path(checkpoint).name}"': f'"{checkpoint}"',
        '.to("cuda")': "",
        "torch.bfloat16": "torch.float32",
    }.items():
        assert old in code, old
        code = code.replace(old, new)
    for output in ("latent", "np"):
        names = {"rng": rng, "output": output, "given": given}
        exec(code, names)
        found.append(torch.as_tensor(names["video"]))
    return names["pipe"], *found
