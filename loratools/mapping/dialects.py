"""The registry of dialects: what a file's keys look like, as data.

A dialect is prefix × spelling × namespace × suffix scheme × alpha rule. Each `Spelling` is one way it writes a module's name;
the first spelling that applies to a component is written, all are read. Adding a dialect is adding one entry to `DIALECTS`.
"""

from __future__ import annotations

import difflib
from dataclasses import dataclass

from loratools.errors import UsageError
from loratools.mapping.architectures import Architecture, Component
from loratools.mapping.rules import DIFF

# What a dialect's readers can hold. `lora` is linear and conv; the others are named as `inspect` names them.
LYCORIS_KINDS = frozenset({"lora", "tucker", "dora", "dora-in", "loha", "lokr", "dense", "norm", "oft", "boft", "ia3", "glora"})
COMFY_KINDS = (LYCORIS_KINDS - {"ia3"}) | {"set"}
PLAIN = frozenset({"lora"})

# Namespaces of text encoders that one dialect (or a checkpoint) uses; the others are aliases that any dialect may carry.
_OWN_SPELLINGS = ("te-processor", "open_clip")


@dataclass(frozen=True)
class Spelling:
    """One way of spelling module names.

    owner: key into Component.prefixes; prefixes: literal ones instead (any component, settled by the name behind it)
    namespace: a table's namespace, or "kohya" / "comfy" for the one the architecture says those tools use
    spelling: "dotted" | "flat" | "flat_" (flattened with a trailing underscore)
    schemes: suffix schemes it is read with; the first is written
    on: "any" | "denoiser" | "text" components
    after: what follows the component's prefix (`unet.` + `base_model.model.`)
    """

    namespace: str
    spelling: str = "dotted"
    schemes: tuple[str, ...] = ("kohya",)
    owner: str = ""
    prefixes: tuple[str, ...] = ()
    on: str = "any"
    after: str = ""

    def applies(self, component: Component) -> bool:
        return self.on == "any" or (self.on == "text") == component.name.startswith("text_encoder")

    def prefixes_for(self, component: Component) -> tuple[str, ...]:
        return tuple(prefix + self.after for prefix in component.prefixes.get(self.owner, ())) if self.owner else self.prefixes

    def namespaces_for(self, architecture: Architecture, component: Component) -> tuple[str, ...]:
        """The table namespaces this reads; text encoders have one name each, with the aliases their table lists."""
        table = component.table
        if component.name.startswith("text_encoder") and self.namespace not in table.spellings:
            aliases = tuple(name for name in table.spellings if name not in _OWN_SPELLINGS)
            return (DIFF, *aliases) if self.namespace in (DIFF, "kohya", "comfy", "omi") else ()
        own = {"kohya": architecture.kohya_namespace, "comfy": architecture.comfy_namespace}
        named = own.get(self.namespace, self.namespace)
        further = architecture.also_read if self.namespace in own else ()
        return (named, *further) if named in table.namespaces or architecture.open_names else ()


@dataclass(frozen=True)
class Dialect:
    """How one family of tools writes adapters.

    alpha: "tensor" (an .alpha tensor) | "header" (lora_adapter_metadata, folded) | "config" (adapter_config.json) | "none" (folded)
    holds: the kinds its readers apply; architectures: () for all
    """

    name: str
    title: str
    rows: str  # of the published list of layouts
    tools: str
    spellings: tuple[Spelling, ...]
    alpha: str
    holds: frozenset[str]
    folder: bool = False
    architectures: tuple[str, ...] = ()
    writable: bool = True
    notes: str = ""
    beside_kohya: bool = False  # spells what `kohya` spells wherever the two use the same names: there it is `kohya`
    hashes: bool = False  # its readers check sshs_model_hash

    def serves(self, architecture: Architecture) -> bool:
        if architecture.open_names:  # a language model: only PEFT writes its modules' own names
            return self.alpha == "config"
        if self.beside_kohya and architecture.kohya_namespace == DIFF:
            return False
        return not self.architectures or architecture.name in self.architectures


_FLAT_KOHYA = Spelling("kohya", "flat", ("kohya",), owner="kohya")

DIALECTS: dict[str, Dialect] = {
    dialect.name: dialect
    for dialect in (
        Dialect(
            "kohya",
            "flattened names under lora_unet_ / lora_te*_",
            "1, 2, 4-11",
            "sd-scripts, musubi-tuner, LyCORIS, ComfyUI, Forge, InvokeAI",
            (_FLAT_KOHYA,),
            "tensor",
            LYCORIS_KINDS | {"oft-list"},
            hashes=True,
        ),
        Dialect(
            "kohya-diffusers",
            "kohya suffixes over diffusers names",
            "3",
            "LCM-LoRA, older OneTrainer, Civitai files",
            (
                Spelling(DIFF, "flat", ("kohya",), owner="kohya", on="denoiser"),
                Spelling(DIFF, "flat", ("kohya",), owner="kohya", on="text"),
            ),
            "tensor",
            LYCORIS_KINDS,
            beside_kohya=True,
            hashes=True,
        ),
        Dialect(
            "lycoris",
            "flattened diffusers names under lycoris_",
            "12",
            "SimpleTuner, LyCORIS wrapper, ComfyUI",
            (Spelling(DIFF, "flat", ("kohya",), owner="lycoris", on="denoiser"),),
            "tensor",
            LYCORIS_KINDS,
        ),
        Dialect(
            "diffusers",
            "component prefix, diffusers names, lora_A / lora_B",
            "16, 19",
            "diffusers, its training scripts, ComfyUI, InvokeAI",
            (
                Spelling(DIFF, "dotted", ("peft",), owner="diffusers"),
                Spelling(DIFF, "dotted", ("peft",), prefixes=("",), on="denoiser"),  # DiffSynth
            ),
            "header",
            frozenset({"lora", "lora-bias", "dora", "qk-norm"}),
        ),
        Dialect(
            "peft",
            "a folder with adapter_config.json, keys under base_model.model.",
            "17, 18",
            "PEFT, vLLM, transformers",
            (
                Spelling(DIFF, "dotted", ("peft", "peft-named"), prefixes=("base_model.model.", "model.", "")),
                Spelling(DIFF, "dotted", ("peft", "peft-named"), owner="diffusers", after="base_model.model."),
                Spelling(DIFF, "dotted", ("peft-named",), owner="diffusers"),
            ),
            "config",
            frozenset({"lora", "lora-bias", "dora", "embedding", "loha", "lokr", "oft-in", "peft-ia3", "set"}),
            folder=True,
        ),
        Dialect(
            "comfy",
            "diffusion_model. and the original names",
            "21, 22, 30",
            "ComfyUI, ai-toolkit, diffusion-pipe, OneTrainer, extracts",
            (
                Spelling("comfy", "dotted", ("peft", "kohya"), owner="comfy"),
                Spelling(DIFF, "dotted", ("peft", "kohya"), owner="comfy", on="denoiser"),
            ),
            "tensor",
            COMFY_KINDS,
        ),
        Dialect(
            "diffusers-dot",
            "component prefix, diffusers names, .lora.down / .lora.up",
            "15",
            "diffusers 0.20 to 0.22",
            (
                Spelling(DIFF, "dotted", ("dot",), owner="diffusers", on="denoiser"),
                Spelling(DIFF, "dotted", ("linear-layer", "dot"), owner="diffusers", on="text"),
            ),
            "none",
            PLAIN,
        ),
        Dialect(
            "diffusers-legacy",
            "attention processors (to_q_lora), lora_linear_layer in text encoders",
            "13, 14",
            "diffusers up to 0.21",
            (
                Spelling("processor", "dotted", ("updown",), owner="diffusers", on="denoiser"),
                Spelling("processor", "dotted", ("updown",), prefixes=("",), on="denoiser"),  # diffusers <= 0.15
                Spelling(DIFF, "dotted", ("linear-layer",), owner="diffusers", on="text"),
                Spelling("te-processor", "dotted", ("updown",), owner="diffusers", on="text"),  # diffusers 0.17
            ),
            "none",
            PLAIN,
        ),
        Dialect(
            "lightning",
            "diffusers names without prefix, lora_down / lora_up / alpha",
            "20",
            "Qwen-Image-Lightning",
            (Spelling(DIFF, "dotted", ("kohya",), prefixes=("",), on="denoiser"),),
            "tensor",
            frozenset({"lora"}),
        ),
        Dialect(
            "onetrainer",
            "flattened diffusers names under lora_transformer_ / lora_unet_",
            "27",
            "OneTrainer",
            (
                Spelling(DIFF, "flat", ("kohya",), owner="onetrainer"),
                Spelling(DIFF, "dotted", ("kohya",), owner="diffusers"),  # its Z-Image files
            ),
            "tensor",
            LYCORIS_KINDS | {"oft-in"},
        ),
        Dialect(
            "omi",
            "original names, fused parts numbered",
            "28",
            "OneTrainer, InvokeAI",
            (Spelling("omi", "dotted", ("kohya",), owner="omi"),),
            "tensor",
            LYCORIS_KINDS,
            architectures=("flux", "sd1", "sd2", "sdxl", "sd3"),
        ),
        Dialect(
            "xlabs",
            "double-stream attention processors of the original Flux",
            "24",
            "x-flux, diffusers, InvokeAI",
            (Spelling("xlabs", "dotted", ("updown",), prefixes=("",), on="denoiser"),),
            "none",
            PLAIN,
            architectures=("flux",),
        ),
        Dialect(
            "uso",
            "x-flux processors of double and single blocks",
            "25",
            "USO, UNO",
            (Spelling("uso", "dotted", ("updown",), prefixes=("",), on="denoiser"),),
            "none",
            PLAIN,
            architectures=("flux",),
        ),
        Dialect(
            "bfl-control",
            "original names without prefix, lora_A / lora_B, bias and norm replacements",
            "26",
            "FLUX.1 Depth / Canny, diffusers, ComfyUI",
            (Spelling("orig", "dotted", ("peft",), prefixes=("",), on="denoiser"),),
            "none",
            frozenset({"lora", "lora-bias", "qk-norm"}),
            architectures=("flux", "chroma", "wan", "lumina2", "sd3"),
        ),
        Dialect(
            "thelastben",
            "kohya suffixes over diffusers names with a trailing underscore",
            "31",
            "TheLastBen's Flux trainer",
            (Spelling(DIFF, "flat_", ("kohya",), owner="kohya", on="denoiser"),),
            "tensor",
            PLAIN,
            architectures=("flux",),
        ),
        Dialect(
            "diffusion-pipe",
            "original names under transformer.",
            "23",
            "diffusion-pipe (HunyuanVideo)",
            (Spelling("orig", "dotted", ("peft",), owner="diffusers", on="denoiser"),),
            "none",
            PLAIN,
            architectures=("hunyuan-video",),
        ),
        Dialect(
            "cloneofsimo",
            "numbered modules (unet:3:up)",
            "35",
            "cloneofsimo/lora",
            (),
            "none",
            PLAIN,
            architectures=("sd1",),
            writable=False,
            notes="positional: the module order of the model that was trained is not in the file",
        ),
    )
}


def dialect_named(name: str) -> Dialect:
    """The dialect of that name. Raises UsageError with the nearest one."""
    if name in DIALECTS:
        return DIALECTS[name]
    near = difflib.get_close_matches(name, DIALECTS, 1)
    hint = f"; did you mean {near[0]!r}?" if near else ""
    raise UsageError(f"unknown dialect {name!r}{hint}", details=[", ".join(DIALECTS)], fix="loratools formats lists them")
