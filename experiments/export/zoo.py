"""E0 and E1 of `nipq verify` for the ONNX files of 37 networks, in ONNX Runtime's faithful mode.

    python -m experiments.export.zoo                # all that have no result yet, one process each
    python -m experiments.export.zoo resnet18 --overwrite

Random weights, random batch norms with gains of both signs, random bits from 2 to 8 for every weight and every input,
boundaries of weights by turns for tensors and for channels; images of normal noise. Nothing is downloaded. A network
that cannot be exported or compared leaves a result with the reason. Needs torchvision, timm and the extra `onnx`.
"""

from __future__ import annotations

import sys
import tempfile
import time
from pathlib import Path

import torch

import nipq
from experiments.export.random_nets import random_network
from experiments.export.records import each, origin, parser, rungs_of, short, write
from experiments.shown import Record
from nipq.prepare.layer_table import layer_table

SEED, IMAGES = 0, 4
COMMAND = "python -m experiments.export.zoo"
#: Networks and the side of their images.
NETWORKS = {
    "alexnet": 96,
    "resnet18": 96,
    "resnet50": 96,
    "resnext50_32x4d": 64,
    "densenet121": 64,
    "squeezenet1_1": 96,
    "googlenet": 96,
    "inception_v3": 96,
    "mobilenet_v2": 96,
    "mobilenet_v3_small": 96,
    "mobilenet_v3_large": 96,
    "mnasnet0_5": 96,
    "shufflenet_v2_x1_0": 96,
    "efficientnet_b0": 96,
    "regnet_y_400mf": 96,
    "convnext_tiny": 96,
    "swin_t": 96,
    "vit_b_16": 96,
    "timm/efficientnet_lite0": 96,
    "timm/mobilenetv4_conv_small": 96,
    "timm/ghostnet_100": 96,
    "timm/repvgg_a0": 96,
    "timm/lcnet_050": 96,
    "timm/fbnetc_100": 96,
    "timm/res2net50_14w_8s": 64,
    "timm/dla34": 96,
    "timm/vit_tiny_patch16_224": 96,
    "timm/mixer_s32_224": 96,
    "timm/edgenext_xx_small": 96,
    "timm/mobilevit_xxs": 128,
    "timm/convmixer_768_32": 56,
    "timm/mixnet_s": 96,
    "timm/hardcorenas_a": 96,
    "timm/tinynet_e": 96,
    "timm/selecsls42b": 64,
    "timm/ese_vovnet19b_dw": 64,
    "timm/efficientnet_es": 96,
}


def measure(name: str) -> Record:
    """Export one network and compare the file with it.

    Args:
        name: of the network.
    """
    started = time.perf_counter()
    torch.set_num_threads(1)
    granularity = ("tensor", "channel")[list(NETWORKS).index(name) % 2]
    facts = {"name": name, "size": NETWORKS[name], "images": IMAGES, "seed": SEED, "granularity": granularity}
    try:
        model, images = random_network(name, NETWORKS[name], SEED, count=IMAGES, granularity=granularity)
        rows = layer_table(model)
        facts["layers"] = len(rows)
        facts["weights"] = sum(row.spec.weight_count for row in rows)
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder) / "model.onnx"
            report = nipq.export(nipq.convert(model), path, images[:2])
            facts |= {"bytes": report.bytes, "warnings": [short(warning) for warning in report.warnings]}
            result = nipq.verify(model, path, loader=[images])
        facts["rungs"] = rungs_of(result)
    except Exception as error:  # whatever it is, it is the result
        facts["error"] = short(error)
    return facts | origin(f"{COMMAND} {name}", time.perf_counter() - started)


def main() -> int:
    """Measure."""
    options = parser(__doc__, "zoo", 300)
    options.add_argument("networks", nargs="*", choices=[[], *NETWORKS], metavar="NETWORK", help="all if left out")
    arguments = options.parse_args()
    names = arguments.networks or list(NETWORKS)
    if arguments.here:
        for name in names:
            write(arguments.out, name.replace("/", "-"), measure(name))
        return 0
    items = [(name.replace("/", "-"), [name]) for name in names]
    return int(each("experiments.export.zoo", items, COMMAND, arguments) > 0)


if __name__ == "__main__":
    sys.exit(main())
