"""toy/evaluate.py: its numbers against closed forms and numpy, and the whole command.

Against: Gaussians whose distance is known, scipy's square root of a matrix, films with one known
fault each, diffusers' pipeline, `w2svd.py sample`, a second run of the same command.
Run with `python -m pytest tests/test_evaluate.py`; about half a minute.
"""

import json
import shutil
import weakref
from pathlib import Path

import imageio.v3 as iio
import numpy as np
import pytest
import torch
from diffusers import HunyuanVideoPipeline
from helpers import contents, names, run, said, timeless
from scipy.linalg import sqrtm

import w2svd
from toy import evaluate
from toy.tiny_hunyuan import SIZE, TEMPLATE, film, save_tiny

LEARN = "--lora-rank 2 --iterations 2 --save-every 1 --log-every 1 --fake-updates 1 --ema 0".split()
LEARN += "--generator-lr .05 --fake-lr .05 --shift 4 --embedded-guidance 3".split()
LONG = "woman " + 200 * "é"  # 406 bytes, where a name of a file may have 255
METHODS = ["euler-4-shift-4", "euler-4-shift-7", "euler-28-shift-7", "student-4"]


@pytest.fixture(scope="module", autouse=True)
def plain_text():
    """The tiny text encoder knows no template."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(w2svd.HunyuanVideo, "prompt_template", TEMPLATE)
        yield


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A tiny pipeline, five clips and a run of them."""
    folder = tmp_path_factory.mktemp("place")
    save_tiny(folder / "tiny")
    (folder / "clips").mkdir()
    for i, caption in enumerate(("a dog", "a red/blue square?", LONG, "the dog", "left")):
        size = (48, 80) if i % 2 else (64, 56)
        film(folder / f"clips/{i}.mp4", frames=30 + 5 * i, size=size, fps=12 + 6 * i)
        (folder / f"clips/{i}.txt").write_text(caption)
    fixed = ["--model", "hunyuan", "--data", folder / "clips", "--checkpoint", folder / "tiny"]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(w2svd.HunyuanTask, "on_log", lambda *args: None)
        run("train", *fixed, *SIZE, *LEARN, "--out", folder / "run")
        full = ["--generator", "full", "--fake", "full"]
        run("train", *fixed, *SIZE, *LEARN, *full, "--out", folder / "full")
    return folder


def command(place, *flags, name="run", code=0):
    """`python -m toy.evaluate` on the run, which must end with this status."""
    fixed = ["--run", place / name, "--data", place / "clips", *flags]
    assert evaluate.main([str(flag) for flag in fixed]) == code


@pytest.fixture(scope="module")
def evaluated(place):
    """The folder of an evaluation of four prompts."""
    command(place, "--n", 4)
    return place / "run/evaluation"


def result_of(folder):
    return json.loads((folder / "evaluation.json").read_text())


# ---- the distance --------------------------------------------------------------------------------


def test_the_distance_of_gaussians_on_a_line_is_the_closed_form():
    rng = torch.Generator().manual_seed(0)
    line, beside = torch.linalg.qr(torch.randn(50, 2, generator=rng))[0].T
    along = torch.randn(40, 1, generator=rng)
    data, variance = 1 + along * line, along.var().item()
    shifted, wider = data + 3 * line, 1 + (along.mean() + 1.5 * (along - along.mean())) * line
    still = data.mean(0).expand(7, -1)
    found, share = evaluate.distances(data, [data, shifted, wider, still, data + 2 * beside], k=1)
    expected = [0.0, 9 / variance, 0.25, 1.0, 4 / variance]  # the last leaves the line
    assert found == pytest.approx(expected, rel=1e-3, abs=1e-5) and share == pytest.approx(1)


@pytest.mark.parametrize("k", [1, 3])
def test_the_distance_is_numpy_s_and_scipy_s(k):
    rng = np.random.default_rng(0)
    data, samples = (rng.normal(size=(n, 30)) * np.linspace(3, 0.5, 30) for n in (40, 20))
    samples += 0.3
    V = np.linalg.svd(data - data.mean(0))[2][:k].T

    def moments(x):
        x = x - data.mean(0)
        rest = np.linalg.norm(x - x @ V @ V.T, axis=1)
        x = np.column_stack([x @ V, rest])
        return x.mean(0), np.cov(x.T)

    (m1, c1), (m2, c2) = moments(samples), moments(data)
    expected = (np.square(m1 - m2).sum() + np.trace(c1 + c2 - 2 * sqrtm(c1 @ c2).real)) / c2.trace()
    found, share = evaluate.distances(*(torch.tensor(x).float() for x in (data, samples[None])), k)
    assert found[0] == pytest.approx(expected, rel=1e-4)
    total = np.cov(data.T)
    assert share == pytest.approx(np.trace(V.T @ total @ V) / total.trace(), rel=1e-4)


def test_fresh_data_are_about_as_far_as_the_data_s_own_row_and_noise_is_farther():
    rng = torch.Generator().manual_seed(0)
    scale = 4 / torch.arange(1, 201)
    data, fresh, noise = (torch.randn(n, 200, generator=rng) for n in (64, 32, 32))
    found, about = evaluate.compare(data * scale, {"fresh": fresh * scale, "noise": noise / 3})
    assert 0 < found["fresh"] < 2 * found["data"] < found["noise"] / 2
    assert about["directions"] == 32 // 8 and about["held_out"] == 32 and about["clips"] == 64
    assert about["estimated"] == 5 + 5 * 6 // 2  # the mean and the covariance of 5 coordinates


# ---- pixels --------------------------------------------------------------------------------------


def clip(seed=0):
    """Frames (9, 32, 48, 3) in [0, 1] of something that moves evenly and has detail."""
    rng = np.random.default_rng(seed)
    wide = rng.uniform(0.2, 0.8, size=(32, 64, 3))
    return np.stack([wide[:, t : t + 48] for t in range(9)])


def ratios(*films):
    return evaluate.against([evaluate.measure(x) for x in films], [evaluate.measure(clip())])


def test_the_pixel_numbers_are_numpy_s():
    x = clip().astype(np.float32)
    tiles = x.mean(-1).reshape(9, 2, 16, 3, 16).mean((2, 4))
    edges = np.abs(np.diff(x, axis=1)).mean() + np.abs(np.diff(x, axis=2)).mean()
    assert evaluate.measure(clip()) == pytest.approx(
        {
            "dynamic_degree": np.abs(np.diff(x, axis=0)).mean(),
            "motion_smoothness": np.abs(np.diff(x, n=2, axis=0)).mean(),
            "flicker": np.abs(np.diff(tiles, n=2, axis=0)).mean(),
            "sharpness": edges / 2,
        },
        rel=1e-4,
    )


def test_the_data_themselves_have_ratios_of_1():
    assert set(ratios(clip()).values()) == {1.0}
    assert ratios(clip(), clip()) == pytest.approx(dict.fromkeys(ratios(clip()), 1.0))


def test_each_fault_moves_its_number():
    frozen = ratios(np.repeat(clip()[:1], 9, axis=0))
    assert frozen["dynamic_degree"] < 1e-4 and frozen["sharpness"] == pytest.approx(1, abs=0.05)
    rng = np.random.default_rng(1)
    noise = ratios(rng.uniform(size=(9, 32, 48, 3)))
    assert noise["flicker"] > 1 and noise["motion_smoothness"] < 1
    light = 0.1 * (-1.0) ** np.arange(9)[:, None, None, None]  # a lamp that flickers
    assert ratios(clip() + light)["flicker"] > 5
    blurred = sum(np.roll(clip(), (i, j), (1, 2)) for i in range(3) for j in range(3)) / 9
    assert ratios(blurred)["sharpness"] < 0.5


def test_films_lie_three_in_a_row_under_their_names():
    films = {f"name-{i}": np.full((5, 480, 64, 3), 10 * i, np.uint8) for i in range(4)}
    shown = evaluate.pages(films)
    assert shown.shape == (5, 2 * (480 + 32), 3 * 64, 3)
    for i, (y, x) in enumerate([(0, 0), (0, 64), (0, 128), (512, 0)]):
        assert (shown[:, y + 32 : y + 512, x : x + 64] == 10 * i).all()
        assert shown[0, y : y + 32, x : x + 64].min() < 128  # a text
    assert (shown[:, 512:, 64:] == 255).all()


# ---- the command ---------------------------------------------------------------------------------


def test_the_command_leaves_films_of_each_method_and_all_numbers(evaluated):
    result = result_of(evaluated)
    assert list(result["methods"]) == ["data", *METHODS]
    assert [row["nfe"] for row in result["methods"].values()] == [0, 4, 4, 28, 4]
    assert sorted(p.name for p in evaluated.iterdir() if p.is_dir()) == sorted(result["methods"])
    films = names(evaluated / "data")
    assert len(films) == 4 and all(names(evaluated / name) == films for name in METHODS)
    captions = {"a dog", "a red blue square", LONG[:93], "the dog", "left"}  # as VBench reads them
    assert {name.rsplit("-", 1)[0] for name in films} <= captions
    for path in evaluated.rglob("*-*.mp4"):
        assert iio.imread(path).shape == (9, 32, 48, 3)
    assert iio.imread(evaluated / "together.mp4").shape == (4 * 9, 2 * 48, 3 * 48, 3)
    for name, row in result["methods"].items():
        assert all(np.isfinite(row[column]) for column in evaluate.SHOWN)
        assert (row["seconds"] > 0) == (name != "data")
    assert {result["methods"]["data"][name] for name in evaluate.SHOWN[1:]} == {1.0}
    assert result["seed"] == 0 and result["seeds"] == [0, 1, 2, 3] and result["step"] == 2
    assert [result[name] for name in ("height", "width", "frames", "fps")] == [32, 48, 9, 12]
    assert "torch" in result["versions"] and len(result["prompts"]) == 4


def test_the_data_s_films_are_the_clips_of_the_prompts_decoded(place, evaluated, tmp_path):
    config = w2svd.read_run(place / "run")
    task, pipe = w2svd.HunyuanTask(config), w2svd.load_pipeline(config.checkpoint, w2svd.TEXT)
    clips = {clip["caption"]: clip["x0"][0] for clip in map(task.read, w2svd.encoded_clips(config))}
    for i, caption in enumerate(result_of(evaluated)["prompts"]):
        evaluate.write_film(tmp_path / "a.mp4", task.decode(pipe, clips[caption][None]), 12)
        film = next((evaluated / "data").glob(f"*-{i}.mp4"))
        assert film.read_bytes() == (tmp_path / "a.mp4").read_bytes()


def test_the_table_has_a_row_for_each_method_and_says_what_it_rests_on(evaluated):
    lines = evaluate.table(result_of(evaluated)).splitlines()
    assert lines[0].split() == ["method", "NFE", "seconds", *evaluate.SHOWN]
    assert [line.split()[0] for line in lines[1:6]] == ["data", *METHODS]
    assert all(len(line) == len(lines[0]) for line in lines[:6]) and len(lines[0]) <= 100
    rest = " ".join(lines[6:])
    assert "5 clips' latents" in rest and "2 clips to the others" in rest and "4 videos" in rest


def test_the_same_seed_gives_the_same_bits_and_another_does_not(place, evaluated):
    for seed in (0, 1):
        command(place, "--n", 4, "--seed", seed, "--out", place / f"seed-{seed}")
    same, other = place / "seed-0", place / "seed-1"
    one, two = contents(evaluated), contents(same)
    films = [p.relative_to(same) for p in two if p.suffix == ".mp4"]
    assert len(films) == 5 * 4 + 1
    assert all(one[evaluated / name] == two[same / name] for name in films)
    assert timeless(result_of(evaluated)) == timeless(result_of(same))
    assert result_of(other)["methods"] != result_of(same)["methods"]
    assert result_of(other)["prompts"] != result_of(same)["prompts"]
    assert result_of(other)["seeds"] == [1_000_003 + i for i in range(4)]


def test_the_backbone_s_28_steps_are_the_stock_pipeline_s(place):
    config = w2svd.read_run(place / "run")
    task, generator = w2svd.HunyuanTask(config), w2svd.read_generator(place / "run")
    file, levels = w2svd.encoded_clips(config)[1], evaluate.grids(generator[1])
    latents, seconds = evaluate.draw(task, [file], levels, generator, [5])
    pipe = HunyuanVideoPipeline.from_pretrained(place / "tiny")
    how = {"height": 32, "width": 48, "num_frames": 9, "guidance_scale": 3.0}
    how |= {"prompt_template": TEMPLATE, "output_type": "latent", "num_inference_steps": 28}
    rng = torch.Generator().manual_seed(5)
    stock = pipe(task.read(file)["caption"], generator=rng, **how).frames
    assert (stock - latents["euler-28-shift-7"]).abs().max() < 1e-5
    own, released = (latents[f"euler-4-shift-{shift}"] for shift in (4, 7))
    assert (own - released).abs().max() > 1e-3 and set(seconds) == set(METHODS)
    assert (latents["student-4"] - own).abs().max() > 1e-3


@pytest.mark.parametrize("name", ["run", "full"])
def test_the_student_s_films_are_those_of_sample(place, evaluated, tmp_path, name):
    folder = evaluated if name == "run" else tmp_path / "full"
    if name == "full":
        command(place, "--n", 4, "--out", folder, name=name)
    caption = result_of(folder)["prompts"][2]
    out = tmp_path / "sample.mp4"
    run("sample", "--run", place / name, "--prompt", caption, "--seed", 2, "--out", out)
    film = next((folder / "student-4").glob("*-2.mp4"))
    assert film.read_bytes() == out.read_bytes()


def test_another_iteration_changes_the_student_alone(place, evaluated, tmp_path):
    command(place, "--n", 4, "--at", 1, "--out", tmp_path / "a")
    one, two = (timeless(result_of(folder))["methods"] for folder in (evaluated, tmp_path / "a"))
    assert {name for name in one if one[name] != two[name]} == {"student-4"}
    assert result_of(tmp_path / "a")["step"] == 1


def test_one_model_is_in_memory_at_a_time(place, tmp_path, monkeypatch):
    shutil.copytree(place / "clips", tmp_path / "clips", ignore=lambda *_: [".w2svd"])
    seen, transformers, load = [], [], w2svd.load_pipeline

    def pipeline(checkpoint, without, **how):
        assert not [t for t in transformers if t() is not None]
        seen.append(without)
        pipe = load(checkpoint, without, **how)
        if pipe.transformer:
            transformers.append(weakref.ref(pipe.transformer))
        return pipe

    monkeypatch.setattr(w2svd, "load_pipeline", pipeline)
    given = ["--run", place / "run", "--data", tmp_path / "clips", "--out", tmp_path / "out"]
    assert evaluate.main([*map(str, given), "--n", "4"]) == 0
    model, vae = (*w2svd.TEXT, "vae"), (*w2svd.TEXT, "transformer")
    assert seen == [("transformer",), model, vae]


def test_a_larger_n_than_there_are_clips_takes_all_and_says_so(place, tmp_path, capsys):
    command(place, "--n", 50, "--out", tmp_path / "a")
    assert "has 5 clips" in capsys.readouterr().out
    assert len(result_of(tmp_path / "a")["prompts"]) == 5


def test_what_cannot_be_compared_is_refused_in_one_sentence(place, evaluated, tmp_path, capsys):
    def refused(*flags, code=2):
        before = contents(tmp_path)
        command(place, *flags, code=code)
        sentence = said(capsys)
        assert sentence.startswith("w2svd: ") and contents(tmp_path) == before
        return sentence

    out = ["--out", tmp_path / "a"]
    assert "in use" in refused()  # RUN/evaluation
    assert evaluate.main(["--run", str(place / "run")]) == 2 and "--data" in said(capsys)
    assert "not a run folder" in refused("--run", tmp_path)
    assert "at least 4" in refused(*out, "--n", 3)
    assert "saved iterations" in refused(*out, "--at", 7)
    assert "no folder of clips" in refused(*out, "--data", tmp_path / "nowhere")
    assert "--checkpoint" in refused(*out, "--checkpoint", tmp_path / "nowhere")
    assert "--help" in refused(*out, "--prompts", 3)
    (tmp_path / "captions.txt").write_text("a dog\n")
    assert "no clips" in refused(*out, "--data", tmp_path / "captions.txt")
    (tmp_path / "few").mkdir()
    assert "can be used" in refused(*out, "--data", tmp_path / "few", code=1)
    for i in range(3):
        film(tmp_path / f"few/{i}.mp4", frames=20, fps=12)
        (tmp_path / f"few/{i}.txt").write_text("dog")
    run("encode", "--data", tmp_path / "few", "--checkpoint", place / "tiny", *SIZE)
    assert "3 clips are too few" in refused(*out, "--data", tmp_path / "few")
    config = json.loads((place / "run/config.json").read_text())
    config["config"] |= {"model": "toy", "data": "ring"}
    (tmp_path / "config.json").write_text(json.dumps(config))
    assert "--model toy" in refused("--run", tmp_path)


def test_a_video_that_is_not_finite_is_refused(place, tmp_path, capsys):
    shutil.copytree(place / "run", tmp_path / "bad", ignore=lambda *_: ["evaluation"])
    path = tmp_path / "bad/generator-000002.safetensors"
    tensors, info = w2svd.read_safetensors(path)
    w2svd.write_safetensors(path, {name: x * torch.nan for name, x in tensors.items()}, info)
    command(place, "--n", 4, name=Path(tmp_path / "bad"), code=2)
    assert "student-4" in said(capsys) and not (tmp_path / "bad/evaluation").exists()
