"""notebooks/evaluate.py: its numbers against numpy's, and the whole command.

Against: numpy, scipy's square root of a matrix, diffusers' pipeline, `w2svd.py sample`. Run with
`python -m pytest tests/test_evaluate.py`; about half a minute.
"""

import json

import evaluate
import imageio.v3 as iio
import numpy as np
import pytest
import torch
from diffusers import HunyuanVideoPipeline
from helpers import names, run, said
from scipy.linalg import sqrtm
from video_runs import SMALL

import w2svd
from toy.tiny_hunyuan import SIZE, TEMPLATE, film, save_tiny

CAPTIONS = ["a dog", "a red/blue square?", "woman " + 200 * "é", "left"]
METHODS = ["euler-4-shift-4", "euler-4-shift-7", "euler-28-shift-7", "student-4"]


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A tiny pipeline, four clips and a run of them; its text encoder knows no template."""
    folder = tmp_path_factory.mktemp("place")
    save_tiny(folder / "tiny")
    (folder / "clips").mkdir()
    for i, caption in enumerate(CAPTIONS):
        film(folder / f"clips/{i}.mp4", fps=12 + 6 * i)  # no two alike
        (folder / f"clips/{i}.txt").write_text(caption)
    fixed = ["--model", "hunyuan", "--data", folder / "clips", "--checkpoint", folder / "tiny"]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(w2svd.HunyuanVideo, "prompt_template", TEMPLATE)
        patch.setattr(w2svd.VideoTask, "on_log", lambda *args: None)
        run("train", *fixed, *SIZE, *SMALL, "--iterations", 2, "--out", folder / "run")
        yield folder


def command(place, *flags, code=0):
    """The command on the run, which must end with this status."""
    fixed = ["--run", place / "run", "--data", place / "clips", *flags]
    assert evaluate.main([str(flag) for flag in fixed]) == code


@pytest.fixture(scope="module")
def evaluated(place):
    """The folder of an evaluation of all prompts."""
    command(place)
    return place / "run/evaluation"


@pytest.mark.parametrize("k", [1, 3])
def test_the_distance_is_numpy_s_and_scipy_s(k):
    rng = np.random.default_rng(0)
    data, samples = (rng.normal(size=(n, 30)) * np.linspace(3, 0.5, 30) for n in (40, 20))
    samples += 0.3
    V = np.linalg.svd(data - data.mean(0))[2][:k].T

    def moments(x):
        x = x - data.mean(0)
        x = np.column_stack([x @ V, np.linalg.norm(x - x @ V @ V.T, axis=1)])
        return x.mean(0), np.cov(x.T)

    (m1, c1), (m2, c2) = moments(samples), moments(data)
    expected = (np.square(m1 - m2).sum() + np.trace(c1 + c2 - 2 * sqrtm(c1 @ c2).real)) / c2.trace()
    found, share = evaluate.distances(*(torch.tensor(x).float() for x in (data, samples[None])), k)
    assert found[0] == pytest.approx(expected, rel=1e-4)
    total = np.cov(data.T)
    assert share == pytest.approx(np.trace(V.T @ total @ V) / total.trace(), rel=1e-4)


def test_the_pixel_numbers_are_numpy_s():
    x = np.random.default_rng(0).uniform(size=(9, 32, 48, 3)).astype(np.float32)
    tiles = x.mean(-1).reshape(9, 2, 16, 3, 16).mean((2, 4))
    edges = np.abs(np.diff(x, axis=1)).mean() + np.abs(np.diff(x, axis=2)).mean()
    expected = {
        "dynamic_degree": np.abs(np.diff(x, axis=0)).mean(),
        "motion_smoothness": np.abs(np.diff(x, n=2, axis=0)).mean(),
        "flicker": np.abs(np.diff(tiles, n=2, axis=0)).mean(),
        "sharpness": edges / 2,
    }
    assert evaluate.measure(x) == pytest.approx(expected, rel=1e-4)


def test_the_command_leaves_films_of_each_method_and_all_numbers(evaluated):
    rows = json.loads((evaluated / "evaluation.json").read_text())["methods"]
    assert list(rows) == ["data", *METHODS]
    assert [row["nfe"] for row in rows.values()] == [0, 4, 4, 28, 4]
    assert all(np.isfinite(row[column]) for row in rows.values() for column in evaluate.SHOWN)
    films = names(evaluated / "data")
    assert len(films) == 4 and all(names(evaluated / name) == films for name in METHODS)
    captions = {"a dog", "a red blue square", CAPTIONS[2][:93], "left"}  # as VBench reads them
    assert {name.rsplit("-", 1)[0] for name in films} == captions
    assert all(iio.imread(path).shape == (9, 32, 48, 3) for path in evaluated.rglob("*-*.mp4"))
    assert iio.imread(evaluated / "together.mp4").shape == (4 * 9, 2 * 48, 3 * 48, 3)


def test_the_student_s_film_is_what_sample_draws(place, evaluated, tmp_path):
    out = tmp_path / "sample.mp4"
    prompt = json.loads((evaluated / "evaluation.json").read_text())["prompts"][2]
    run("sample", "--run", place / "run", "--prompt", prompt, "--seed", 2, "--out", out)
    assert next((evaluated / "student-4").glob("*-2.mp4")).read_bytes() == out.read_bytes()


def test_the_backbone_s_28_steps_are_the_stock_pipeline_s(place):
    task, generator = (read(place / "run") for read in (w2svd.read_run, w2svd.read_generator))
    task, levels = w2svd.load_task(task), evaluate.grids(generator[1])
    file = w2svd.encoded_clips(task.config, task.backbone)[1]
    latents, _ = evaluate.draw(task, [file], levels, generator, [5])
    pipe = HunyuanVideoPipeline.from_pretrained(place / "tiny")
    how = {"height": 32, "width": 48, "num_frames": 9, "guidance_scale": 3.0}
    how.update(prompt_template=TEMPLATE, output_type="latent", num_inference_steps=28)
    rng = torch.Generator().manual_seed(5)
    stock = pipe(task.read(file)["caption"], generator=rng, **how).frames
    assert (stock - latents["euler-28-shift-7"]).abs().max() < 1e-5
    own, released, student = (latents[METHODS[i]] for i in (0, 1, 3))
    assert (own - released).abs().max() > 1e-3 and (student - own).abs().max() > 1e-3


def test_what_cannot_be_compared_is_refused_in_one_sentence(place, tmp_path, capsys):
    for word, *flags in (
        ("in use", "--out", place / "run"),
        ("run folder", "--run", tmp_path),
        ("at least 4", "--n", 3),
        ("saved iterations", "--at", 7),
        ("no folder of clips", "--data", tmp_path / "nowhere"),
    ):
        command(place, "--out", tmp_path / "out", *flags, code=2)
        sentence = said(capsys)
        assert sentence.startswith("w2svd: ") and word in sentence
        assert not (tmp_path / "out").exists()
