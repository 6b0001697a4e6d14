"""Networks in the runtimes that people deploy on: python -m benchmarks.serving, on one thread of a CPU.

``proportion``: second_order on five backbones by head and width, relative to timm's own network; batch 1, random
weights. ``runtimes``: the networks that ship, in each runtime: time, and accuracy on 1 000 test images of CIFAR-10
(``python examples/cifar10_folder.py .cache/cifar10`` makes the folder); int8 takes its ranges from 256 training
images. ResNet-50's networks, time alone. ``requests``: an image alone and in a batch, memory over 2 000 requests of
changing sizes, and what happens with NaN, uint8, and an image without its batch.

Each part is kept as benchmarks/results/serving/PART.json, row by row. docs/measured.py writes the tables.
"""

import argparse
import json
import math
import os
import tempfile
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import openvino
import timm
import torch
from onnx.compose import merge_models
from onnxruntime.quantization import CalibrationDataReader, quantize_static
from torch import nn
from torchvision.datasets import ImageFolder

from benchmarks import ROOT, timing
from timm_gsop.complete_file import replacing

RESULTS = ROOT / "benchmarks/results/serving"
BACKBONES = ("mobilenetv3_small_050", "convnext_atto", "vit_tiny_patch16_224", "resnet18", "resnet50")
HEADS: dict[str, dict[str, Any]] = {
    **{f"isqrt, {dim}": dict(isqrt_dim=dim) for dim in (32, 64, 128, 256)},
    "isqrt, 256, rank 256": dict(isqrt_dim=256, pool_kwargs=dict(rank=256)),
    "isqrt, 256, rank 64": dict(isqrt_dim=256, pool_kwargs=dict(rank=64)),
    "compact_bilinear, 2048": dict(global_pool="compact_bilinear", compact_bilinear_dim=2048),
    "svpn": dict(global_pool="svpn"),
    "moment": dict(global_pool="moment"),
}
CLASSES = (10, 1000)
IMAGE = 224
SHIPPED = ("preresnet20", "gsop_preresnet20_net1", "gsop_preresnet20_net2")
LARGE = ("resnet50", "gsop_resnet50_net1", "gsop_resnet50_net2")
WITH_WEIGHTS = ("gsop_preresnet20_net1", "gsop_preresnet20_net2")
REQUESTS, MAX_BATCH, SIDES = 2000, 8, (32, 40, 48, 64)
SAMPLE_SECONDS = 0.03  # shorter runs are repeated until a sample takes this long
Run = Callable[[np.ndarray], np.ndarray]
FLOAT32 = {"INFERENCE_PRECISION_HINT": "f32"}


def eager(model: nn.Module) -> Run:
    """PyTorch, as it is."""

    @torch.inference_mode()
    def run(x: np.ndarray) -> np.ndarray:
        return model(torch.from_numpy(x)).numpy()

    return run


def torchscript(model: nn.Module, x: torch.Tensor) -> Run:
    """A trace, frozen: PyTorch folds and fuses what it can."""
    with torch.no_grad():
        return eager(torch.jit.freeze(torch.jit.trace(model, x)))


def ort(model: Path | bytes) -> Run:
    """ONNX Runtime on one thread."""
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = options.inter_op_num_threads = 1
    options.log_severity_level = 3
    session = onnxruntime.InferenceSession(model, options, providers=["CPUExecutionProvider"])
    name = session.get_inputs()[0].name
    return lambda x: session.run(None, {name: x})[0]


def ov(path: Path, **config: str) -> Run:
    """OpenVINO on one thread."""
    compiled = openvino.compile_model(path, "CPU", {"INFERENCE_NUM_THREADS": 1, **config})
    request = compiled.create_infer_request()
    return lambda x: request.infer([x])[0].copy()


def export(model: nn.Module, x: torch.Tensor, path: Path, free: tuple[int, ...] = ()) -> Path:
    """To ONNX; dimensions of the image tensor that are ``free`` take any size, the others that of ``x``."""
    shapes = {} if not free else dict(dynamic_shapes=(dict.fromkeys(free, torch.export.Dim.AUTO),))
    example = torch.cat([x, x]) if 0 in free and len(x) == 1 else x
    torch.onnx.export(model, (example,), dynamo=True, verbose=False, **shapes).save(path)
    return path


class Part(nn.Module):
    """One method of a network, as a module."""

    def __init__(self, model: nn.Module, method: str) -> None:
        super().__init__()
        self.model, self.method = model, method

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Call it."""
        return getattr(self.model, self.method)(x)


def export_parts(model: nn.Module, x: torch.Tensor, features: Path, path: Path) -> Path:
    """To ONNX, with features that were exported before: the same graph, in a fraction of the time."""
    with torch.inference_mode():
        maps = model.forward_features(x).clone()
    export(Part(model, "forward_head").eval(), maps, path)
    first, second = onnx.load(features), onnx.load(path)
    joint = [(first.graph.output[0].name, f"head/{second.graph.input[0].name}")]
    onnx.save(merge_models(first, onnx.compose.add_prefix(second, "head/"), joint), path)
    return path


def measure_time(runs: dict[str, Run], x: np.ndarray, rounds: int) -> dict[str, dict[str, float]]:
    """Time of each, relative to the first in the same round."""
    once = min(timing.seconds(partial(next(iter(runs.values())), x)) for _ in range(2))
    repeats = math.ceil(SAMPLE_SECONDS / once)

    def repeated(run: Run) -> None:
        for _ in range(repeats):
            run(x)

    return timing.time_paired({name: partial(repeated, run) for name, run in runs.items()}, rounds, repeats)


def count(*modules: nn.Module) -> int:
    """Parameters."""
    return sum(p.numel() for module in modules for p in module.parameters())


def proportion(args: argparse.Namespace, folder: Path) -> Iterator[dict[str, Any]]:
    """A row for each backbone: its heads, beside timm's own network."""
    x, backbones = torch.randn(1, 3, IMAGE, IMAGE), {}
    for backbone in BACKBONES:
        create = partial(timm.create_model, "second_order", backbone=backbone)
        models = {"timm's": timm.create_model(backbone).eval()}
        files = {"timm's": export(models["timm's"], x, folder / "timm.onnx")}
        for name, kwargs in HEADS.items():
            model = models[name] = create(**kwargs).eval()
            model.backbone = backbones.setdefault(backbone, model.backbone)  # one serves all heads
            features = folder / f"features_{model.keeps_tokens}.onnx"
            if not features.exists():
                export(Part(model, "forward_features").eval(), x, features)
            files[name] = export_parts(model, x, features, folder / f"{name}.onnx")
        sizes = {}
        for name, model in models.items():
            params = {
                n: count(create(num_classes=n, **HEADS[name]))
                if name in HEADS
                else count(timm.create_model(backbone, num_classes=n))
                for n in CLASSES
            }
            width = model.head_hidden_size if name in HEADS else getattr(model, "head_hidden_size", model.num_features)
            sizes[name] = dict(features=width, params=params)
        ways: dict[str, dict[str, Run]] = {
            "eager": {name: eager(model) for name, model in models.items()},
            "onnxruntime": {name: ort(file) for name, file in files.items()},
            "openvino": {name: ov(file, **FLOAT32) for name, file in files.items()},
        }
        expected = {name: run(x.numpy()) for name, run in ways["eager"].items()}
        row: dict[str, Any] = dict(backbone=backbone, sizes=sizes, alternatives={}, wrong={})
        for way, runs in ways.items():
            right = {name: run for name, run in runs.items() if is_same(run(x.numpy()), expected[name])}
            row["wrong"][way] = [name for name in runs if name not in right]
            row["alternatives"][way] = measure_time(right, x.numpy(), args.rounds)
        for file in folder.iterdir():
            file.unlink()
        yield row


def is_same(found: np.ndarray, expected: np.ndarray) -> bool:
    """Whether a runtime's logits are those of PyTorch, to 1e-4 of the largest."""
    return bool(np.abs(found - expected).max() < 1e-4 * np.abs(expected).max())


def create(name: str) -> nn.Module:
    """A network, of ten classes if it is small, with its weights if it ships."""
    if name in WITH_WEIGHTS:
        return timm.create_model(name, pretrained=True).eval()
    name, classes = (f"{name}.untrained" if "gsop" in name else name), (10 if name in SHIPPED else 1000)
    return timm.create_model(name, num_classes=classes).eval()


class Ranges(CalibrationDataReader):
    """Batches for int8's ranges."""

    def __init__(self, name: str, batches: list[np.ndarray]) -> None:
        self.batches = iter([{name: batch} for batch in batches])

    def get_next(self) -> dict[str, np.ndarray] | None:
        """The next one."""
        return next(self.batches, None)


def cifar10(folder: Path, model: nn.Module, split: str, number: int) -> tuple[np.ndarray, np.ndarray]:
    """Images of a folder, as the network wants them, evenly taken from all classes; and their labels."""
    if not (folder / split).is_dir():
        raise ValueError(f"--cifar10={folder} has no {split}; python examples/cifar10_folder.py {folder} makes it.")
    data = ImageFolder(str(folder / split), timm.data.create_transform(**timm.data.resolve_model_data_config(model)))
    chosen = [data[i] for i in range(0, len(data), len(data) // number)][:number]
    return np.stack([image.numpy() for image, _ in chosen]), np.array([label for _, label in chosen])


def in_all_runtimes(model: nn.Module, x: torch.Tensor, folder: Path, ranges: np.ndarray | None) -> dict[str, Run]:
    """A network in every runtime; in int8 only with images for its ranges."""
    path = export(model, x, folder / "model.onnx", free=(0,))
    runs = {
        "PyTorch": eager(model),
        "TorchScript": torchscript(model, x),
        "ONNX Runtime": ort(path),
        "OpenVINO, float32": ov(path, **FLOAT32),
        "OpenVINO": ov(path),
    }
    if ranges is not None:
        batches = np.array_split(ranges, len(ranges) // 32)
        options: dict[str, Any] = dict(op_types_to_quantize=["Conv", "Gemm"], per_channel=True)
        quantize_static(path, folder / "int8.onnx", Ranges("x", batches), **options)
        runs["ONNX Runtime, int8"] = ort(folder / "int8.onnx")
        runs["OpenVINO, the same int8"] = ov(folder / "int8.onnx", **FLOAT32)
    return runs


def runtimes(args: argparse.Namespace, folder: Path) -> Iterator[dict[str, Any]]:
    """A row for each runtime and batch: the networks of a family, relative to the one without second-order pooling."""
    for family, side, batches in ((SHIPPED, 32, (1, 8)), (LARGE, IMAGE, (8,))):
        networks, accuracy = {}, {}
        for name in family:
            model, has_weights = create(name), name in WITH_WEIGHTS
            ranges = cifar10(args.cifar10, model, "train", 256)[0] if family is SHIPPED else None
            networks[name] = in_all_runtimes(model, torch.randn(8, 3, side, side), folder, ranges)
            if has_weights:
                images, labels = cifar10(args.cifar10, model, "validation", 1000)
                answers = {
                    way: np.concatenate([run(part) for part in np.array_split(images, 125)]).argmax(1)
                    for way, run in networks[name].items()
                }
                accuracy[name] = {
                    way: dict(top1=100 * (a == labels).mean(), same=100 * (a == answers["PyTorch"]).mean())
                    for way, a in answers.items()
                }
        for batch in batches:
            x = np.random.default_rng(0).standard_normal((batch, 3, side, side), np.float32)
            for way in networks[family[0]]:
                rounds = args.rounds if family is SHIPPED else 2
                found = measure_time({name: networks[name][way] for name in family}, x, rounds)
                of_way = {name: each[way] for name, each in accuracy.items()}
                yield dict(family=family[0], way=way, batch=batch, alternatives=found, accuracy=of_way)


def requests(args: argparse.Namespace, folder: Path) -> Iterator[dict[str, Any]]:
    """A row for each network and runtime: what a server would meet."""
    rng = np.random.default_rng(0)
    for name in (SHIPPED[0], SHIPPED[2]):
        model = create(name)
        path = export(model, torch.randn(2, 3, 32, 32), folder / f"{name}.onnx", free=(0, 2, 3))
        for way, run in {
            "PyTorch": eager(model),
            "ONNX Runtime": ort(path),
            "OpenVINO, float32": ov(path, **FLOAT32),
        }.items():
            images = rng.standard_normal((MAX_BATCH, 3, 32, 32)).astype(np.float32)
            together, alone = run(images), np.concatenate([run(image[None]) for image in images])
            with_nan = images.copy()
            with_nan[0, 0, 5, 5] = np.nan
            answer = run(with_nan)
            others = np.abs(answer[1:] - together[1:]).max() == 0
            own = "NaN" if np.isnan(answer[0]).all() else "numbers"
            nan = f"{own}; other images of the batch {'unchanged' if others else 'changed'}"
            yield dict(
                network=name,
                way=way,
                invariance=float(np.abs(together - alone).max() / np.abs(together).max()),
                nan=nan,
                uint8=what_happens(run, (255 * rng.random((1, 3, 32, 32))).astype(np.uint8)),
                without_batch=what_happens(run, images[0]),
                memory=memory_of(run, rng),
            )


def what_happens(run: Run, x: np.ndarray) -> str:
    """The first words of the error, or that there is an answer."""
    try:
        answer = run(x)
    except Exception as error:  # of whatever kind
        return f"{type(error).__name__}: {' '.join(str(error).split())[:160]}"
    return f"answers {answer.shape}, {answer.dtype}"


def memory_of(run: Run, rng: np.random.Generator) -> dict[str, float]:
    """Resident MB after so many requests of changing batches and sizes."""
    megabytes = {}
    for i in range(REQUESTS + 1):
        if i in (0, REQUESTS // 4, REQUESTS // 2, REQUESTS):
            megabytes[str(i)] = resident_megabytes()
        run(rng.standard_normal((rng.integers(1, MAX_BATCH + 1), 3, *rng.choice(SIDES, 2)), np.float32))
    return megabytes


def resident_megabytes() -> float:
    """Of this process, on Linux."""
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE") / 1e6


PARTS = {part.__name__: part for part in (proportion, runtimes, requests)}


def show(row: dict[str, Any]) -> None:
    """Print a row, without what the tables have no place for."""
    print(json.dumps({key: value for key, value in row.items() if key != "sizes"}, default=str)[:600], flush=True)


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("parts", nargs="*", choices=[*PARTS, []], help="default: all")
    parser.add_argument("--rounds", type=int, default=5, help="how often each alternative is timed")
    parser.add_argument("--cifar10", type=Path, default=Path(".cache/cifar10"), help="folder of images")
    parser.add_argument("--output", type=Path, default=RESULTS)
    args = parser.parse_args()
    timing.set_up()
    torch.set_num_threads(1)
    args.output.mkdir(parents=True, exist_ok=True)
    versions = dict(onnxruntime=onnxruntime.__version__, openvino=openvino.__version__.partition("-")[0])
    for name in args.parts or PARTS:
        rows = []
        with tempfile.TemporaryDirectory() as folder:
            for row in PARTS[name](args, Path(folder)):
                rows.append(row)
                show(row)
                result = dict(machine={**timing.machine("cpu"), **versions}, load=os.getloadavg()[1], rows=rows)
                with replacing(args.output / f"{name}.json") as path:
                    path.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
