"""Fine-tuning before distillation, on data that the backbone does not know: a table of the toy.

    python -m toy.moved        3 seeds, 5 minutes on one CPU core; a stored seed is kept

The ring moved by half its radius after the backbone learnt it. `toy.baselines.finetune` learns the
moved ring by flow matching; its adapter is added to the backbone's weights, and W2SVD distils the
sum. Beside it W2SVD of the backbone as it is. Every setting is the toy's preset. The results go to
toy/results/moved.json, seed by seed.
"""

import copy
import json
from pathlib import Path

import torch
from tqdm import tqdm

import w2svd
from toy import baselines
from toy.metrics import Metrics
from toy.study.study import GROUPS, task_of
from toy.table import PLACES, spread

SEEDS = range(50, 53)  # no trial used them since the random streams changed
FINETUNE = {"iterations": 720, "generator_lr": 3e-3}  # by seed 100
STORED = Path(__file__).parent / "results/moved.json"
METHODS = {  # as the table names them, with their evaluations
    "backbone": ("backbone, Euler", 28),
    "finetuned": ("fine-tuned backbone, Euler", 28),
    "distilled": ("W2SVD of the backbone", 4),
    "finetuned, distilled": ("W2SVD of the fine-tuned backbone", 4),
    "floor": ("exact samples", ""),
}


def train(task, config, loop=w2svd.distil):
    """A run of the loop on the task's backbone: its roles, the generator averaged."""
    torch.manual_seed(config.seed)
    roles = w2svd.Roles(task.backbone, config.lora_rank, config.alpha_weak, config.alpha_strong)
    state = w2svd.State(config, roles, task.device)
    for _ in tqdm(loop(config, roles, state, task.batches()), total=config.iterations):
        pass
    roles.load("generator", state.average)
    return roles


def merge(roles, module):
    """Put W + B A, the backbone's weights with the generator's adapter, into a module like it."""
    with roles.use("generator"):
        for layer in roles.layers:
            layer.merge(adapter_names=["generator"])
    merged = roles.backbone.module.state_dict()
    names = [name for name in merged if "lora_" not in name]
    module.load_state_dict({name.replace(".base_layer", ""): merged[name] for name in names})


def run(seed):
    """The metrics of every method on one seed."""
    config = w2svd.resolve({"model": "toy", "seed": seed})
    task = task_of(GROUPS["moved"], config)
    task.load()
    measure, result = Metrics(task.mixture, 16384), {}
    result["floor"] = measure.floor(torch.Generator().manual_seed(5))

    def euler():
        shift = task.best_shift(measure, 28)
        return {"shift": shift, **measure(task.euler(28, shift, measure.n))}

    def student():
        generator = train(task, config).generator
        return measure(task.few_step(generator, task.sigmas, measure.n, seed=2))

    plain = copy.deepcopy(task.backbone.module)
    result["backbone"], result["distilled"] = euler(), student()
    task.backbone.module = copy.deepcopy(plain)
    longer = w2svd.resolve({"model": "toy", "seed": seed, **FINETUNE})
    merge(train(task, longer, baselines.finetune), plain)
    task.backbone.module = plain.requires_grad_(False)
    result["finetuned"], result["finetuned, distilled"] = euler(), student()
    return result


def markdown(results):
    """Mean ± half a 95 % interval over seeds, for every method."""
    columns = ("kl", "sliced_w2", "precision", "coverage")
    lines = [f"| method | NFE | {' | '.join(columns)} |", "|---" * (len(columns) + 2) + "|"]
    for name, (title, nfe) in METHODS.items():
        rows = [result[name] for result in results.values()]
        cells = [spread([row[c] for row in rows], PLACES.get(c, 3)) for c in columns]
        lines.append(f"| {title} | {nfe} | {' | '.join(cells)} |")
    return "\n".join(lines)


if __name__ == "__main__":
    torch.set_num_threads(1)
    found = json.loads(STORED.read_text()) if STORED.exists() else {}
    for seed in SEEDS:
        if str(seed) not in found:
            found[str(seed)] = run(seed)
            w2svd.write_json(STORED, found)
    print(markdown(found))
