"""Small folders of pictures in the layouts that people have: ILSVRC's, torchvision's, CIFAR-10's, WebDataset's."""

import csv
import io
import pickle
import tarfile

import numpy as np
from PIL import Image

SYNSETS = {"n01440764": "tench, Tinca tinca", "n02123045": "tabby, tabby cat", "n07920052": "espresso"}


def picture(seed, width=40, height=32, mode="RGB"):
    """A smooth picture, which JPEG keeps well, different for each seed."""
    rng = np.random.default_rng(seed)
    coarse = Image.fromarray(rng.integers(0, 256, (4, 5, 3), np.uint8))
    return coarse.resize((width, height), Image.Resampling.BICUBIC).convert(mode)


def encoded(image, format="JPEG", **options):
    content = io.BytesIO()
    image.save(content, format, **options)
    return content.getvalue()


def write(path, content):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content)


def imagenet(root, per_class=4, val_per_class=2, *, ground_truth="val.txt", width=40, height=32):
    """The layout of ILSVRC: train/nXXXXXXXX/*.JPEG, val/*.JPEG without folders, a list of labels, synset_words.txt.

    ground_truth: "val.txt" (Caffe's list), "LOC_val_solution.csv" (Kaggle's), or None for none.
    """
    seed = 0
    for name in SYNSETS:
        for i in range(per_class):
            write(root / f"train/{name}/{name}_{i}.JPEG", encoded(picture(seed, width, height)))
            seed += 1
    # validation pictures are in no order of classes
    labels = [number for _ in range(val_per_class) for number in (2, 0, 1)]
    names = [f"ILSVRC2012_val_{i + 1:08d}" for i in range(len(labels))]
    for name in names:
        write(root / f"val/{name}.JPEG", encoded(picture(seed, width, height)))
        seed += 1
    wnids = list(SYNSETS)
    if ground_truth == "val.txt":
        lines = [f"{name}.JPEG {label}\n" for name, label in zip(names, labels, strict=True)]
        write(root / "val.txt", "".join(lines).encode())
    elif ground_truth == "LOC_val_solution.csv":
        with (root / ground_truth).open("w", newline="") as file:
            rows = csv.writer(file)
            rows.writerow(["ImageId", "PredictionString"])
            rows.writerows([name, f"{wnids[label]} 1 2 3 4 "] for name, label in zip(names, labels, strict=True))
    write(root / "synset_words.txt", "".join(f"{wnid} {words}\n" for wnid, words in SYNSETS.items()).encode())
    return labels


def folders(root, classes=("cat", "dog"), per_class=3, splits=("train", "val"), **size):
    """root/SPLIT/CLASS/*.jpg."""
    seed = 0
    for split in splits:
        for name in classes:
            for i in range(per_class):
                write(root / split / name / f"{i}.jpg", encoded(picture(seed, **size)))
                seed += 1


def cifar(root, version, per_file=3):
    """The files of CIFAR-10, `version` "binary" or "python"; returns pixels (N, 32, 32, 3) and labels in file order."""
    rng = np.random.default_rng(0)
    pixels, labels = [], []
    for name in [*(f"data_batch_{i}" for i in range(1, 6)), "test_batch"]:
        planes = rng.integers(0, 256, (per_file, 3072), np.uint8)
        numbers = rng.integers(0, 10, per_file).tolist()
        if version == "binary":
            records = np.concatenate([np.array(numbers, np.uint8)[:, None], planes], 1)
            write(root / f"{name}.bin", records.tobytes())
        else:
            names = [b"%s_%d.png" % (name.encode(), i) for i in range(per_file)]
            content = {b"batch_label": name.encode(), b"labels": numbers, b"data": planes, b"filenames": names}
            write(root / name, pickle.dumps(content, protocol=2))
        pixels.append(planes.reshape(-1, 3, 32, 32).transpose(0, 2, 3, 1))
        labels += numbers
    return np.concatenate(pixels), labels


def webdataset(root, pictures=7, per_tar=3):
    """root/train-000000.tar ... and root/val-000000.tar of KEY.jpg, KEY.cls and a KEY.json that nobody needs."""
    root.mkdir(parents=True, exist_ok=True)
    for split, seed in (("train", 0), ("val", 1000)):
        for first in range(0, pictures, per_tar):
            with tarfile.open(root / f"{split}-{first // per_tar:06d}.tar", "w") as tar:
                for i in range(first, min(first + per_tar, pictures)):
                    members = {"jpg": encoded(picture(seed + i)), "cls": str(i % 3).encode(), "json": b"{}"}
                    for ending, content in members.items():
                        info = tarfile.TarInfo(f"part/{i:04d}.{ending}")
                        info.size = len(content)
                        tar.addfile(info, io.BytesIO(content))


def assert_is_torchvisions(pixels, image, size):
    """Equal to torchvision's Resize and CenterCrop, but for steps of 1."""
    from torchvision.transforms import v2

    wanted = np.asarray(v2.CenterCrop(size)(v2.Resize(size)(image.convert("RGB"))))
    assert pixels.shape == (size, size, 3)
    assert np.abs(pixels.astype(int) - wanted).max() <= 1
