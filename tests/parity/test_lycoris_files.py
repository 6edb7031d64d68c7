"""Files the LyCORIS library writes: what its network computes is the hand merge of our conversions' ΔW, kind by kind.

The oracle is the network's forward pass; LyCORIS' own `get_diff_weight` applies the scale of LoHa and LoKr twice.
"""

from __future__ import annotations

from collections.abc import Callable
from copy import deepcopy
from pathlib import Path
from typing import Any

import pytest
import torch

from fixtures import adapters, make
from loratools.operations.inspect import inspect
from tests import reference
from tests.parity.support import apart, assert_deltas

pytest.importorskip("lycoris")
pytestmark = pytest.mark.parity

TOLERANCE = 2e-6

KINDS: dict[str, tuple[dict[str, Any], set[str]]] = {  # options of create_lycoris → kinds in the file
    "lora": ({"algo": "lora"}, {"lora"}),
    "locon-tucker": ({"algo": "locon", "use_tucker": True}, {"lora"}),
    "lora-rslora": ({"algo": "lora", "rs_lora": True}, {"lora"}),
    "loha": ({"algo": "loha"}, {"loha"}),
    "loha-tucker": ({"algo": "loha", "use_tucker": True}, {"loha"}),
    "lokr": ({"algo": "lokr", "factor": 4}, {"lokr"}),
    "lokr-tucker": ({"algo": "lokr", "factor": 4, "use_tucker": True}, {"lokr"}),
    "lokr-both": ({"algo": "lokr", "factor": 8, "decompose_both": True}, {"lokr"}),
}


@pytest.fixture
def trained(request: pytest.FixtureRequest, tmp_path: Path, bases: Callable[[str], make.Base]) -> tuple[Path, torch.Tensor]:
    """(the file as SimpleTuner saves it, the network's output)."""
    from lycoris import create_lycoris

    model = deepcopy(bases("sd1").models["unet"])
    network = create_lycoris(model, 1.0, linear_dim=3, linear_alpha=2, conv_dim=3, conv_alpha=2, **KINDS[request.param][0])
    network.apply_to()  # its parameters are registered only now
    network.eval()
    noise = torch.Generator().manual_seed(11)
    for _, parameter in sorted(network.named_parameters()):
        parameter.data.copy_(torch.randn(parameter.shape, generator=noise) * 0.2)
    path = tmp_path / "lycoris.safetensors"
    network.save_weights(str(path), torch.float32, {})
    return path, make.forward(make.Base("sd1", {"unet": model}))["unet"]


@pytest.mark.parametrize(("trained", "kind"), [(kind, kind) for kind in KINDS], ids=list(KINDS), indirect=["trained"])
def test_forward_is_the_merge_of_every_conversion(
    trained: tuple[Path, torch.Tensor], kind: str, bases: Callable[[str], make.Base], convert: Callable[..., Path]
) -> None:
    path, output = trained
    model = bases("sd1").models["unet"]
    flat = {name.replace(".", "_"): name for name in adapters.layers(model)}
    source = reference.deltas(path)
    truth = {flat[name.removeprefix("lycoris_")]: delta for name, delta in source.items()}
    assert len(truth) > 200
    merged = adapters.merged(model, truth)
    bare = make.forward(make.Base("sd1", {"unet": model}))["unet"]
    assert apart(output, bare) > 1e-3
    assert apart(make.forward(make.Base("sd1", {"unet": merged}))["unet"], output) <= TOLERANCE

    page = inspect(path, arch="sd1")
    assert (page["dialect"], page["adapter"]["modules"], set(page["adapter"]["kinds"])) == ("lycoris", len(truth), KINDS[kind][1])
    kohya = convert(path, "kohya", arch="sd1")  # LoHa and LoKr flatten the 1x1 convolutions that tell SD1 from SD2
    assert_deltas(reference.deltas(kohya), {name.replace("lycoris_", "lora_unet_"): delta for name, delta in source.items()}, 0.0)
    plain = convert(kohya, "diffusers", kind="lora", arch="sd1")
    found = {name: delta.reshape(truth[name.removeprefix("unet.")].shape) for name, delta in reference.deltas(plain).items()}
    assert_deltas(found, {f"unet.{name}": delta for name, delta in truth.items()})
