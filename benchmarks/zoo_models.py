"""Models for the conformance run, by set: name -> factory of (model, example inputs)."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
import torchvision
from torch import Tensor, nn
from torch.nn import functional as F
from zoo_written import GAT, GCN, GraphSAGE, UNet3d

Factory = Callable[[], tuple[nn.Module, Any]]
LARGEST = 700_000_000
"""Parameters above which a model is left out: its proof would not fit the memory and time given to one model."""

PIXELS = {"inception_v3": 80, "maxvit_t": 224, "alexnet": 64, "squeezenet": 64}
"""Smallest sides of the pictures that some models take; 64 does for the others, 224 for ViT."""


def torchvision_models() -> dict[str, Factory]:
    """All classification models of torchvision."""
    names = torchvision.models.list_models(module=torchvision.models)
    return {name: partial(_classifier, name) for name in names}


def _classifier(name: str) -> tuple[nn.Module, Any]:
    pixels = next((side for start, side in PIXELS.items() if name.startswith(start)), 64)
    pixels = 224 if name.startswith("vit") else pixels
    extra: dict[str, Any] = {"init_weights": True} if name in ("inception_v3", "googlenet") else {}
    if name == "vit_h_14":
        extra["image_size"] = pixels  # not 518: its proof in float64 would take most of an hour
    model = torchvision.models.get_model(name, weights=None, **extra)
    return model, torch.randn(1 if name == "vit_h_14" else 2, 3, pixels, pixels)


def other_vision() -> dict[str, Factory]:
    """Segmentation, video, and the backbones of detectors."""
    segmentation = torchvision.models.list_models(module=torchvision.models.segmentation)
    found: dict[str, Factory] = {name: partial(_segmenter, name) for name in segmentation}
    for name in ("r3d_18", "mc3_18", "r2plus1d_18", "s3d", "mvit_v1_b", "mvit_v2_s", "swin3d_t"):
        found[name] = partial(_video, name)
    for name in ("fasterrcnn_resnet50_fpn", "retinanet_resnet50_fpn", "fasterrcnn_mobilenet_v3_large_fpn"):
        found[f"{name}.backbone"] = partial(_backbone, name)
    return found


def _segmenter(name: str) -> tuple[nn.Module, Any]:
    return torchvision.models.get_model(name, weights=None, weights_backbone=None), torch.randn(2, 3, 64, 64)


def _backbone(name: str) -> tuple[nn.Module, Any]:
    model, image = _segmenter(name)
    return model.get_submodule("backbone"), image


def _video(name: str) -> tuple[nn.Module, Any]:
    frames, pixels = (16, 224) if name.startswith(("mvit", "s3d")) else (4, 64)
    return torchvision.models.get_model(name, weights=None), torch.randn(1, 3, frames, pixels, pixels)


TIMM = [
    "resnet18", "resnet26d", "resnext50_32x4d", "seresnet50", "wide_resnet50_2", "resnest14d", "res2net50_26w_4s",
    "resnetv2_50", "dla34", "dpn68", "densenet121", "vgg11_bn", "efficientnet_b0", "tf_efficientnetv2_b0",
    "mobilenetv2_100", "mobilenetv3_small_100", "mnasnet_100", "mobilenetv4_conv_small", "fbnetc_100", "lcnet_050",
    "tinynet_e", "ghostnet_100", "rexnet_100", "hardcorenas_a", "mixnet_s", "semnasnet_075", "regnetx_002",
    "regnety_002", "nfnet_l0", "dm_nfnet_f0", "convnext_atto", "convnextv2_atto", "convmixer_768_32", "cspresnet50",
    "cspdarknet53", "darknet53", "hrnet_w18_small", "inception_v4", "inception_resnet_v2", "xception41",
    "legacy_xception", "repvgg_a2", "resmlp_12_224", "mixer_s32_224", "gmlp_s16_224", "poolformer_s12",
    "poolformerv2_s12", "vit_tiny_patch16_224", "deit_tiny_patch16_224", "deit3_small_patch16_224",
    "beit_base_patch16_224", "cait_xxs24_224", "swin_tiny_patch4_window7_224", "swinv2_tiny_window8_256",
    "levit_128s", "pit_ti_224", "twins_svt_small", "pvt_v2_b0", "xcit_nano_12_p16_224", "coat_tiny", "convit_tiny",
    "crossvit_tiny_240", "edgenext_xx_small", "efficientformer_l1", "efficientvit_b0", "fastvit_t8",
    "focalnet_tiny_srf", "gcvit_xxtiny", "hgnet_tiny", "inception_next_tiny", "maxvit_rmlp_pico_rw_256",
    "coatnet_pico_rw_224", "mobileone_s0", "mobilevit_xxs", "mobilevitv2_050", "mvitv2_tiny", "nest_tiny",
    "repghostnet_050", "repvit_m0_9", "selecsls42", "sequencer2d_s", "skresnet18", "starnet_s1", "tiny_vit_5m_224",
    "tnt_s_patch16_224", "tresnet_m", "visformer_tiny", "volo_d1_224", "eva02_tiny_patch14_224", "davit_tiny",
    "hiera_tiny_224", "vovnet39a", "ese_vovnet19b_dw",
]  # fmt: skip


def timm_models() -> dict[str, Factory]:
    """One small member of each of timm's families."""
    import timm  # noqa: F401 (once, for all the processes that are forked)

    return {f"timm:{name}": partial(_timm, name) for name in TIMM}


def _timm(name: str) -> tuple[nn.Module, Any]:
    import timm

    model = timm.create_model(name, pretrained=False)
    channels, height, width = model.default_cfg["input_size"]
    fixed = model.default_cfg.get("fixed_input_size", False) or "mixer" in name or "mlp" in name
    side = height if fixed else min(height, 128)
    return model, torch.randn(2, channels, side, side if height == width else width)


Row = tuple[Any, Any, Any]
"""A class of transformers, its configuration and an example."""


def transformers_models() -> dict[str, Factory]:
    """Small random configurations, heads included."""
    made = _decoders() | _encoders_and_pairs()
    return {f"hf:{name}": partial(_hugging_face, *row) for name, row in made.items()}


def _decoders() -> dict[str, Row]:
    import transformers as tr

    tokens = torch.randint(0, 50, (2, 7))
    words = {"vocab_size": 64}
    llama = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4,
             "num_key_value_heads": 2, "use_cache": False, **words}  # fmt: skip
    ids = {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}
    one = {"input_ids": tokens, "use_cache": False}
    return {
        "gpt2": (tr.GPT2LMHeadModel, tr.GPT2Config(n_embd=32, n_layer=2, n_head=4, **words, **ids), one),
        "llama": (tr.LlamaForCausalLM, tr.LlamaConfig(**llama), one),
        "mistral": (tr.MistralForCausalLM, tr.MistralConfig(**llama), one),
        "mixtral": (
            tr.MixtralForCausalLM,
            tr.MixtralConfig(num_local_experts=4, experts_implementation="eager", **llama),
            one,
        ),
        "qwen2": (tr.Qwen2ForCausalLM, tr.Qwen2Config(**llama), one),
        "phi3": (tr.Phi3ForCausalLM, tr.Phi3Config(**llama, **ids), one),
        "mamba2": (
            tr.Mamba2ForCausalLM,
            tr.Mamba2Config(hidden_size=32, num_hidden_layers=2, num_heads=8, head_dim=8, state_size=16, n_groups=2,
                            chunk_size=4, expand=2, use_cache=False, **words, **ids),
            {"input_ids": tokens},
        ),
        "qwen3_next": (
            tr.Qwen3NextForCausalLM,
            tr.Qwen3NextConfig(head_dim=8, linear_num_key_heads=2, linear_num_value_heads=4, linear_key_head_dim=8,
                               linear_value_head_dim=8, num_experts=4, num_experts_per_tok=2, moe_intermediate_size=16,
                               shared_expert_intermediate_size=16, layer_types=["linear_attention", "full_attention"],
                               experts_implementation="eager", **llama),
            one,
        ),
        "gemma": (tr.GemmaForCausalLM, tr.GemmaConfig(head_dim=8, **llama), one),
    }  # fmt: skip


def _encoders_and_pairs() -> dict[str, Row]:
    import transformers as tr

    tokens = torch.randint(0, 50, (2, 7))
    words = {"vocab_size": 64}
    bert = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
    ids = {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}
    whisper = {"d_model": 32, "encoder_layers": 1, "decoder_layers": 1, "encoder_attention_heads": 4,
               "decoder_attention_heads": 4, "encoder_ffn_dim": 48, "decoder_ffn_dim": 48, "num_mel_bins": 8,
               "max_source_positions": 16, "max_target_positions": 16, "decoder_start_token_id": 1,
               "suppress_tokens": None, "begin_suppress_tokens": None, **words, **ids}  # fmt: skip
    one = {"input_ids": tokens, "use_cache": False}
    both = {"input_ids": tokens, "decoder_input_ids": tokens, "use_cache": False}
    picture = torch.randn(2, 3, 32, 32)
    return {
        "bert": (tr.BertForMaskedLM, tr.BertConfig(**bert, **words), {"input_ids": tokens}),
        "roberta": (
            tr.RobertaForMaskedLM,
            tr.RobertaConfig(max_position_embeddings=40, **bert, **words),
            {"input_ids": tokens},
        ),
        "distilbert": (
            tr.DistilBertForMaskedLM,
            tr.DistilBertConfig(dim=32, hidden_dim=48, n_layers=2, n_heads=4, **words),
            {"input_ids": tokens},
        ),
        "electra": (tr.ElectraForMaskedLM, tr.ElectraConfig(embedding_size=32, **bert, **words), {"input_ids": tokens}),
        "t5": (
            tr.T5ForConditionalGeneration,
            tr.T5Config(d_model=32, d_kv=8, d_ff=48, num_layers=2, num_heads=4, **words),
            both,
        ),
        "bart": (
            tr.BartForConditionalGeneration,
            tr.BartConfig(d_model=32, encoder_layers=1, decoder_layers=1, encoder_attention_heads=4,
                          decoder_attention_heads=4, encoder_ffn_dim=48, decoder_ffn_dim=48, **words),
            both,
        ),
        "opt": (
            tr.OPTForCausalLM,
            tr.OPTConfig(hidden_size=32, ffn_dim=48, num_hidden_layers=2, num_attention_heads=4,
                         max_position_embeddings=40, word_embed_proj_dim=32, **words),
            one,
        ),
        "bloom": (tr.BloomForCausalLM, tr.BloomConfig(hidden_size=32, n_layer=2, n_head=4, **words), one),
        "vit": (tr.ViTForImageClassification, tr.ViTConfig(image_size=32, patch_size=8, **bert), picture),
        "whisper": (
            tr.WhisperForConditionalGeneration,
            tr.WhisperConfig(**whisper),
            {"input_features": torch.randn(2, 8, 32), "decoder_input_ids": tokens, "use_cache": False},
        ),
    }  # fmt: skip


def _hugging_face(build: Callable[[Any], nn.Module], config: Any, example: Any) -> tuple[nn.Module, Any]:
    return build(config), example


def ultralytics_models() -> dict[str, Factory]:
    """Detectors and a segmenter from their yaml files, 80 classes, nothing downloaded."""
    import ultralytics.nn.tasks  # noqa: F401 (once, for all the processes that are forked)

    return {f"ultralytics:{name}": partial(_ultralytics, name) for name in ULTRALYTICS}


ULTRALYTICS = ["yolov8n", "yolov8n-seg", "yolo11n", "rtdetr-l"]


def _ultralytics(name: str) -> tuple[nn.Module, Any]:
    from ultralytics.nn import tasks

    kinds = {"rtdetr-l": tasks.RTDETRDetectionModel, "yolov8n-seg": tasks.SegmentationModel}
    model = kinds.get(name, tasks.DetectionModel)(f"{name}.yaml", verbose=False)
    for parameter in model.parameters():
        parameter.requires_grad_()  # the fixed weights that sum a distribution are frozen by the trainer, not here
    side = 160 if name == "rtdetr-l" else 64  # it ranks 300 places
    return model, torch.randn(2, 3, side, side)


def audio_models() -> dict[str, Factory]:
    """torchaudio, for which torch 2.9.1 is the last: in a virtual environment of its own."""

    def conv_tasnet() -> tuple[nn.Module, Any]:
        from torchaudio.models import ConvTasNet

        small = {"enc_num_feats": 32, "msk_num_feats": 24, "msk_num_hidden_feats": 48, "msk_num_layers": 3}
        return ConvTasNet(num_sources=2, enc_kernel_size=8, msk_num_stacks=2, **small), torch.randn(2, 1, 200)

    def wav2vec2() -> tuple[nn.Module, Any]:
        from torchaudio.models import wav2vec2_model

        model = wav2vec2_model(
            extractor_mode="group_norm", extractor_conv_layer_config=[(32, 10, 5), (32, 3, 2), (32, 2, 2)],
            extractor_conv_bias=False, encoder_embed_dim=32, encoder_projection_dropout=0.1, encoder_pos_conv_kernel=8,
            encoder_pos_conv_groups=4, encoder_num_layers=2, encoder_num_heads=4, encoder_attention_dropout=0.1,
            encoder_ff_interm_features=48, encoder_ff_interm_dropout=0.1, encoder_dropout=0.1,
            encoder_layer_norm_first=False, encoder_layer_drop=0.0, aux_num_out=12,
        )  # fmt: skip
        return model, torch.randn(2, 800)

    return {"torchaudio:ConvTasNet": conv_tasnet, "torchaudio:Wav2Vec2": wav2vec2}


def written_models() -> dict[str, Factory]:
    """Graph networks and a 3D U-Net, written out in `zoo_written`."""
    edges = torch.randint(0, 20, (2, 60), generator=torch.Generator().manual_seed(0))
    adjacency = torch.sparse_coo_tensor(edges, torch.rand(60), (20, 20), check_invariants=True).coalesce()
    nodes = torch.randn(20, 6)
    return {
        "GCN, sparse": lambda: (GCN(6, 32, 3), (nodes, adjacency)),
        "GAT": lambda: (GAT(6, 4, 8, 3), (nodes, edges)),
        "GraphSAGE, by scatter": lambda: (GraphSAGE(6, 32, 3), (nodes, edges)),
        "3D U-Net, deep supervision": lambda: (UNet3d(), torch.randn(2, 1, 8, 8, 8)),
    }


class Wrapped(nn.Module):
    """a -> core -> b: something to cut before and after a module."""

    def __init__(self, core: nn.Module, width: int, out: int, before: nn.Module | None = None) -> None:
        super().__init__()
        self.a, self.core, self.b = before or nn.Linear(6, width), core, nn.Linear(out, 3)

    def forward(self, x: Tensor) -> Tensor:
        """The first output of the core, if it has several."""
        y = self.core(self.a(x))
        out: Tensor = self.b(y[0] if isinstance(y, tuple) else y)
        return out


@dataclass
class Answer:
    """An output that is a dataclass."""

    scores: Tensor
    hidden: tuple[Tensor, ...]


class Structured(nn.Module):
    """Returns a dataclass with a tuple in it."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.c = nn.Linear(6, 8), nn.Linear(8, 8), nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Answer:
        """Scores and sums."""
        hidden = F.relu(self.b(F.relu(self.a(x))))
        return Answer(self.c(hidden), (hidden.sum(-1),))


class TiedHead(nn.Module):
    """An embedding whose matrix is the head's too."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.f, self.head = nn.Embedding(11, 8), nn.Linear(8, 8), nn.Linear(8, 11, bias=False)
        self.head.weight = self.embed.weight

    def forward(self, x: Tensor) -> Tensor:
        """Tokens to scores."""
        out: Tensor = self.head(F.relu(self.f(self.embed(x))))
        return out


class TwoSides(nn.Module):
    """nn.Bilinear on two branches."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.mix, self.c = nn.Linear(6, 8), nn.Linear(6, 7), nn.Bilinear(8, 7, 5), nn.Linear(5, 3)

    def forward(self, x: Tensor) -> Tensor:
        """Both branches read x."""
        out: Tensor = self.c(F.relu(self.mix(F.relu(self.a(x)), F.relu(self.b(x)))))
        return out


def plain_models() -> dict[str, Factory]:
    """torch.nn's own modules, each between two layers that can be cut."""
    x, long = torch.randn(3, 5, 6), torch.randn(2, 6, 12)
    picture, cube = torch.randn(2, 3, 12, 12), torch.randn(1, 3, 6, 6, 6)

    def sequence(core: Callable[[], nn.Module], width: int, out: int) -> Factory:
        return lambda: (Wrapped(core(), width, out), x)

    def stack(*layers: Callable[[], nn.Module], example: Tensor) -> Factory:
        return lambda: (nn.Sequential(*(layer() for layer in layers)), example)

    return {
        "nn.LSTM": sequence(lambda: nn.LSTM(8, 7), 8, 7),
        "nn.LSTM, 2 layers": sequence(lambda: nn.LSTM(8, 7, 2, batch_first=True), 8, 7),
        "nn.LSTM, both directions": sequence(lambda: nn.LSTM(8, 7, 2, bidirectional=True), 8, 14),
        "nn.LSTM, projected": sequence(lambda: nn.LSTM(8, 7, proj_size=4), 8, 4),
        "nn.GRU": sequence(lambda: nn.GRU(8, 7, 2), 8, 7),
        "nn.RNN": sequence(lambda: nn.RNN(8, 7, nonlinearity="relu"), 8, 7),
        "nn.LSTM, stacked": lambda: (Wrapped(nn.Identity(), 7, 7, _Stack()), x),
        "nn.LSTMCell": lambda: (Wrapped(nn.LSTMCell(8, 7), 8, 7), x[0]),
        "nn.GRUCell": lambda: (Wrapped(nn.GRUCell(8, 7), 8, 7), x[0]),
        "nn.RNNCell": lambda: (Wrapped(nn.RNNCell(8, 7), 8, 7), x[0]),
        "nn.MultiheadAttention": sequence(lambda: _Self(8, 4), 8, 8),
        "nn.TransformerEncoder": sequence(
            lambda: nn.TransformerEncoder(nn.TransformerEncoderLayer(8, 4, 16), 2, enable_nested_tensor=False), 8, 8
        ),
        "nn.Transformer": lambda: (nn.Transformer(8, 4, 1, 1, 16, batch_first=True), (torch.randn(2, 5, 8),) * 2),
        "nn.Embedding, tied head": lambda: (TiedHead(), torch.randint(0, 11, (2, 5))),
        "nn.Conv1d": stack(lambda: nn.Conv1d(6, 8, 3), nn.ReLU, lambda: nn.Conv1d(8, 5, 3), example=long),
        "nn.Conv3d": stack(lambda: nn.Conv3d(3, 8, 3), nn.ReLU, lambda: nn.Conv3d(8, 5, 3), example=cube),
        "nn.ConvTranspose2d": stack(
            lambda: nn.Conv2d(3, 8, 3), nn.ReLU, lambda: nn.ConvTranspose2d(8, 6, 2), lambda: nn.Conv2d(6, 3, 1),
            example=picture),
        "nn.ConvTranspose2d, grouped": stack(
            lambda: nn.Conv2d(3, 8, 3), lambda: nn.ConvTranspose2d(8, 8, 2, groups=4), lambda: nn.Conv2d(8, 3, 1),
            example=picture),
        "nn.GroupNorm": stack(
            lambda: nn.Conv2d(3, 12, 3), lambda: nn.GroupNorm(4, 12), lambda: nn.Conv2d(12, 3, 1), example=picture),
        "nn.PixelShuffle": stack(
            lambda: nn.Conv2d(3, 16, 3), lambda: nn.PixelShuffle(2), lambda: nn.Conv2d(4, 3, 1), example=picture),
        "nn.Unfold": stack(
            lambda: nn.Conv2d(3, 8, 3), lambda: nn.Unfold(3), lambda: nn.Conv1d(72, 3, 1), example=picture),
        "nn.Bilinear": lambda: (TwoSides(), x),
        "outputs in a dataclass": lambda: (Structured(), x),
    }  # fmt: skip


class _Stack(nn.Module):
    """One-layer LSTMs, whose widths are free."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.LSTM(6, 8), nn.LSTM(8, 7)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.second(self.first(x)[0])[0]
        return out


class _Self(nn.Module):
    """Self-attention."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.attention = nn.MultiheadAttention(width, heads)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.attention(x, x, x)[0]
        return out


SETS: dict[str, Callable[[], dict[str, Factory]]] = {
    "plain": plain_models,
    "transformers": transformers_models,
    "torchvision": torchvision_models,
    "vision": other_vision,
    "timm": timm_models,
    "written": written_models,
    "ultralytics": ultralytics_models,
    "audio": audio_models,
}


def every() -> Iterator[tuple[str, str]]:
    """(set, name) of all."""
    for name, models in SETS.items():
        for model in models():
            yield name, model
