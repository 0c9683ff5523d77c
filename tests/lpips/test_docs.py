"""docs/lpips.md: its code and commands run, and its count of bytes is what is counted."""

import re
from pathlib import Path

import pytest
import torch

import fastalex
from fastalex import cli

PAGE = (Path(__file__).parents[2] / "docs" / "lpips.md").read_text()


def blocks(language):
    return re.findall(rf"^```{language}\n(.*?)^```$", PAGE, re.MULTILINE | re.DOTALL)


@pytest.fixture(autouse=True)
def no_downloads(monkeypatch):
    """Random ImageNet weights in the place of torchvision's."""
    state = fastalex.LPIPS(pnet_rand=True).net.state_dict()
    state = {"features." + name.partition(".")[2]: value for name, value in state.items()}
    monkeypatch.setattr(torch.hub, "load_state_dict_from_url", lambda url, **options: state)
    metrics = pytest.importorskip("torchmetrics.functional.image.lpips")
    networks = metrics._get_tv_model_features
    monkeypatch.setattr(metrics, "_get_tv_model_features", lambda net, pretrained=False: networks(net, False))


def test_python(capsys):
    code = blocks("python")
    assert len(code) == 3
    names = {}
    for block in code:
        exec(block.replace("256, 256", "64, 64"), names)
    expected = names["loss"](names["image"], names["target"], normalize=True)
    printed = float(re.search(r"tensor\(([\d.]+)", capsys.readouterr().out)[1])
    assert printed == pytest.approx(expected.mean().item(), abs=1e-4)
    assert names["image"].grad.abs().max() > 0
    torch.testing.assert_close(names["distance"], expected)


def test_one_line_of_migration():
    import fastalex as lpips

    assert "`import fastalex as lpips`" in PAGE
    assert isinstance(lpips.LPIPS(net="alex"), torch.nn.Module)


def test_commands(tmp_path, monkeypatch):
    image = pytest.importorskip("PIL.Image")
    monkeypatch.chdir(tmp_path)
    for name in ("before.png", "after.png", "renders/1.png", "references/1.png"):
        Path(name).parent.mkdir(exist_ok=True)
        image.effect_noise((40, 40), 60).convert("RGB").save(name)
    (commands,) = blocks("sh")
    for command in commands.strip().splitlines():
        program, *arguments = command.partition("#")[0].split()
        assert program == "fastalex"
        cli.main([*arguments, "--device", "cpu"])
    assert {path.name for path in tmp_path.iterdir()} >= {"difference.png", "scores.json"}


@pytest.mark.parametrize("net", ["alex", *(pytest.param(net, marks=pytest.mark.slow) for net in ("vgg", "squeeze"))])
def test_traffic(net):
    pytest.importorskip("triton")
    from benchmarks.lpips_traffic import row

    for name in ("eager-nchw", "fastalex"):
        assert row(name, net) in PAGE
