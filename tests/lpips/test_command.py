"""`fastalex lpips`: two pictures, two folders, and one line for each thing that can be wrong with them."""

import json

import pytest

pytest.importorskip("tyro")

import torch
from PIL import Image

import fastalex
from fastalex import cli


@pytest.fixture(scope="module")
def trunk(tmp_path_factory):
    """Random weights of AlexNet's convolutions, as torchvision names them."""
    torch.manual_seed(0)
    state = fastalex.LPIPS(pnet_rand=True).net.state_dict()
    path = tmp_path_factory.mktemp("trunk") / "alexnet.pth"
    torch.save({"features." + name.partition(".")[2]: value for name, value in state.items()}, path)
    return path


def picture(path, size=(48, 40), seed=0):
    path.parent.mkdir(exist_ok=True)
    pixels = torch.randint(256, (size[1], size[0], 3), generator=torch.Generator().manual_seed(seed))
    Image.fromarray(pixels.byte().numpy()).save(path)
    return path


def run(*arguments, trunk):
    cli.main(["lpips", *map(str, arguments), "--trunk", str(trunk), "--device", "cpu"])


def test_two_pictures(tmp_path, trunk, capsys):
    a, b = picture(tmp_path / "a.png"), picture(tmp_path / "b.png", seed=1)
    run(a, b, "--json", tmp_path / "out.json", "--map", tmp_path / "map.png", trunk=trunk)
    found = json.loads((tmp_path / "out.json").read_text())
    images = [torch.frombuffer(Image.open(p).tobytes(), dtype=torch.uint8).view(40, 48, 3) for p in (a, b)]
    images = [image.permute(2, 0, 1)[None].float() / 255 for image in images]
    expected = fastalex.LPIPS(trunk=trunk)(*images, normalize=True).item()
    assert found["distances"]["a.png"] == found["mean"] == pytest.approx(expected, rel=1e-5)
    assert (found["net"], found["version"]) == ("alex", "0.1")
    assert f"{expected:.4f}" in capsys.readouterr().out
    with Image.open(tmp_path / "map.png") as drawn:
        assert drawn.width > drawn.height > 200


def test_two_folders(tmp_path, trunk, capsys):
    for seed, folder in enumerate(("left", "right")):
        for number in range(3):
            picture(tmp_path / folder / f"{number}.png", size=(40 + number, 40), seed=10 * number + seed)
    (tmp_path / "left" / "notes.txt").write_text("no picture")
    options = ("--json", tmp_path / "out.json", "--map", tmp_path / "maps")
    run(tmp_path / "left", tmp_path / "right", *options, trunk=trunk)
    found = json.loads((tmp_path / "out.json").read_text())
    assert list(found["distances"]) == ["0.png", "1.png", "2.png"]
    assert found["mean"] == pytest.approx(sum(found["distances"].values()) / 3)
    assert sorted(path.name for path in (tmp_path / "maps").iterdir()) == ["0.png", "1.png", "2.png"]
    text = capsys.readouterr().out
    assert "mean of 3" in text
    run(tmp_path / "left", tmp_path / "left", trunk=trunk)
    assert "0.0000" in capsys.readouterr().out


def error(capsys, *arguments, trunk):
    with pytest.raises(SystemExit) as stopped:
        run(*arguments, trunk=trunk)
    assert stopped.value.code == 2
    message = capsys.readouterr().err
    assert message.startswith("fastalex: error: ")
    assert message.count("\n") == 1
    return message


def test_errors(tmp_path, trunk, capsys):
    a, b = picture(tmp_path / "a.png"), picture(tmp_path / "b.png", size=(50, 40))
    left = picture(tmp_path / "left" / "1.png").parent
    right = picture(tmp_path / "right" / "2.png").parent
    (tmp_path / "empty").mkdir()
    (tmp_path / "text.png").write_text("no picture")
    small = picture(tmp_path / "small.png", size=(20, 20))
    for arguments, message in (
        ((a, tmp_path / "none.png"), f"no such file or folder: {tmp_path / 'none.png'}"),
        ((a, left), f"{left} is a folder and {a} is not: compare two pictures or two folders"),
        ((left, right), f"{right} lacks 1 of the other folder's pictures: 1.png"),
        ((tmp_path / "empty",) * 2, f"{tmp_path / 'empty'} holds no pictures"),
        ((a, b), f"pictures must have one size: {a} has 48x40 and {b} has 50x40 pixels"),
        ((a, tmp_path / "text.png"), "text.png is not an image that can be read"),
        ((small, small), f'{small}: in0 must be at least 31 x 31 for net="alex"'),
    ):
        assert message in error(capsys, *arguments, trunk=trunk)
    assert "trunk must be an existing file" in error(capsys, a, a, trunk=tmp_path / "none.pth")
