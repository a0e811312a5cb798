"""Adapters for timm: attention and mixed convolutions of any width, from timm's own methods (see `inferred_sizes`)."""

from __future__ import annotations

from contextlib import suppress
from importlib import import_module

from torch import nn

from .inferred_sizes import inferring
from .registry import adapter

CLASSES = {
    "layers.attention_pool": ("AttentionPoolLatent",),
    "layers.mixed_conv2d": ("MixedConv2d",),
    "layers.pos_embed_rel": ("RelPosBias", "RelPosMlp"),
    "layers.selective_kernel": ("SelectiveKernel",),
    "models.beit": ("Attention",),
    "models.cait": ("ClassAttn", "TalkingHeadAttn"),
    "models.convit": ("GPSA", "MHSA"),
    "models.crossvit": ("CrossAttention",),
    "models.davit": ("ChannelAttention", "ChannelAttentionV2", "WindowAttention"),
    "models.edgenext": ("CrossCovarianceAttn",),
    "models.efficientformer": ("Attention",),
    "models.eva": ("EvaAttention",),
    "models.fastvit": ("Attention",),
    "models.gcvit": ("WindowAttentionGlobal",),
    "models.hiera": ("MaskUnitAttention",),
    "models.levit": ("Attention", "AttentionDownsample"),
    "models.mvitv2": ("MultiScaleAttention", "MultiScaleAttentionPoolFirst"),
    "models.nest": ("Attention",),
    "models.pvt_v2": ("Attention",),
    "models.swin_transformer_v2": ("WindowAttention",),
    "models.swin_transformer_v2_cr": ("WindowMultiHeadAttention",),
    "models.tiny_vit": ("Attention",),
    "models.twins": ("GlobalSubSampleAttn", "LocallyGroupedAttn"),
    "models.volo": ("Attention", "OutlookAttention"),
    "models.xcit": ("XCA",),
}
"""Classes that cannot be cut as they are, by module of timm; one that a release has not is left out."""

METHODS = ("forward", "get_attention", "get_attention_biases", "get_bias")
"""Where their sizes are."""

EDITS = {
    # two sizes to be inferred, one of which is known
    "reshape(B, -1, 2, self.num_heads, C": "reshape(B, x.shape[1], 2, self.num_heads, C",
    "reshape(B, -1, self.dim_out)": "flatten(-2).flatten(1, -2)",
    "reshape(B, -1, self.val_attn_dim)": "flatten(-2)",
    # a list of the channels of every part
    "torch.split(x, self.splits, 1)": "torch.split(x, [conv.in_channels for conv in self.values()], 1)",
    "torch.split(x, self.in_channels // self.num_paths, 1)": "torch.chunk(x, self.num_paths, 1)",
    # a tuple that ends in the number of heads
    "view(self.bias_shape)": "view(*self.bias_shape[:-1], -1)",
    # a scale read from the width of the heads, where that is what may go: hiera has stages of one head
    "F.scaled_dot_product_attention(q, k, v)": "F.scaled_dot_product_attention(q, k, v, scale=self.scale)",
    # position biases cached at the first call, although heads may change
    "if torch.jit.is_tracing() or self.training:": "if True:",
}
"""What has to be replaced in their source besides."""


def adapted_class(base: type[nn.Module], name: str) -> type[nn.Module] | None:
    """A subclass of that name with its sizes inferred; None if it would be the same."""
    own = {key: vars(base)[key] for key in METHODS if key in vars(base)}
    changed = {key: made for key, method in own.items() if (made := inferring(method, EDITS)) is not method}
    about = {"__module__": __name__, "__qualname__": name, "__doc__": f"`{base.__name__}` of any width."}
    return type(name, (base,), {**about, **changed}) if changed else None


for path, names in CLASSES.items():
    with suppress(ImportError, OSError):  # a release without this module, or an installation without sources
        module = import_module(f"timm.{path}")
        for class_name in names:
            unique = f"{class_name}_{path.rpartition('.')[2]}"
            base = getattr(module, class_name, None)
            if base is not None and (subclass := adapted_class(base, unique)) is not None:
                globals()[unique] = adapter(base)(subclass)  # where pickle looks for it
