"""The 45 systems in order of their numbers: which paper each is, and whether its experiment is built."""

from __future__ import annotations

import importlib
import importlib.util
from collections.abc import Sequence
from dataclasses import dataclass
from types import ModuleType

from mechlab.core.errors import UserError, did_you_mean


@dataclass(frozen=True, kw_only=True)
class System:
    """One paper and the place of its experiment.

    Attributes:
      number: number of the system, from 1.
      slug: the name on the command line and of the modules.
      family: the folder the slug lives in.
      title: title of the paper.
      paper: where it appeared: arXiv id and year, or the venue and year where there is no id.
    """

    number: int
    slug: str
    family: str
    title: str
    paper: str

    @property
    def module(self) -> str:
        """Import path of the experiment."""
        return f"experiments.{self.family}.{self.slug}"

    @property
    def ready(self) -> bool:
        """Whether the experiment is built; its module is looked for, not imported."""
        try:
            return importlib.util.find_spec(self.module) is not None
        except ModuleNotFoundError:
            return False


def find(slug: str, systems: Sequence[System]) -> System:
    """The system called ``slug``.

    Args:
      slug: name to look up.
      systems: catalogue to look it up in.

    Returns:
      The system.

    Raises:
      UserError: no system has this slug; the message names the nearest.
    """
    for system in systems:
        if system.slug == slug:
            return system
    near = did_you_mean(slug, [system.slug for system in systems])
    raise UserError(f'unknown system "{slug}".{near or " See: python -m experiments list"}')


def load(system: System) -> ModuleType:
    """Import the experiment of a built system.

    Args:
      system: a system that is ``ready``.

    Returns:
      The module, which offers ``CLAIMS``, ``PRESETS`` and ``run(key, config, log)``.

    Raises:
      UserError: the experiment needs a package that is not installed.
    """
    try:
        return importlib.import_module(system.module)
    except ModuleNotFoundError as error:
        missing = (error.name or "").split(".")[0]
        if missing in ("mechlab", "experiments"):
            raise
        raise UserError(f'"{system.slug}" needs the package "{missing}", which is not installed') from error


# fmt: off
_TABLE: tuple[tuple[int, str, str, str, str], ...] = (
    (1, "dopamine", "adaptation", "arXiv 2602.11726 (2026)",
     "Dopamine: Brain Modes, Not Brains (TauGate: threshold-and-gain tuning)"),
    (2, "bone", "adaptation", "arXiv 2409.15371 (2024)",
     "Bone: Block Affine Transformation as Parameter Efficient Fine-tuning Methods for Large "
     "Language Models"),
    (3, "rich_lazy", "neuro", "arXiv 2310.08513 (2023)",
     "How connectivity structure shapes rich and lazy learning in neural circuits"),
    (4, "physics_steering", "steering", "arXiv 2511.20798 (2025)",
     "Physics Steering: Causal Control of Cross-Domain Concepts in a Physics Foundation Model"),
    (5, "ncap", "body", "arXiv 2201.05242 (2022)",
     "Neural Circuit Architectural Priors for Embodied Control"),
    (6, "rnn_dynamics", "neuro", "arXiv 2005.02211 (2020)",
     "Recurrent Neural Network Learning of Performance and Intrinsic Population Dynamics from "
     "Sparse Neural Data"),
    (7, "pain_srnn", "body", "arXiv 2212.14806 (2022)",
     "Pain level and pain-related behaviour classification using GRU-based sparsely-connected RNNs"),
    (8, "wina", "compression", "arXiv 2505.19427 (2025)",
     "WINA: Weight Informed Neuron Activation for Accelerating Large Language Model Inference"),
    (9, "ofq", "compression", "arXiv 2302.02210 (2023)",
     "Oscillation-free Quantization for Low-bit Vision Transformers"),
    (10, "transient_semantics", "neuro", "arXiv 0903.1979 (2009)",
     "Semantic learning in autonomously active recurrent neural networks"),
    (11, "emotion_probes", "steering", "arXiv 2510.04064 (2025)",
     "Decoding Emotion in the Deep: How LLMs Represent, Retain, and Express Emotion"),
    (12, "zeroquant_v2", "compression", "arXiv 2303.08302 (2023)",
     "ZeroQuant-V2: Exploring Post-training Quantization in LLMs from Comprehensive Study to "
     "Low Rank Compensation"),
    (13, "classp", "neuro", "arXiv 2405.09637 (2024)",
     "CLASSP: a Biologically-Inspired Approach to Continual Learning through Adjustment "
     "Suppression and Sparsity Promotion"),
    (14, "truthprint", "steering", "arXiv 2503.10602 (2025)",
     "TruthPrInt: Mitigating LVLM Object Hallucination Via Latent Truthful-Guided "
     "Pre-Intervention (with ComnHallu)"),
    (15, "fast_ibp", "architectures", "arXiv 2103.17268 (2021)",
     "Fast Certified Robust Training with Short Warmup"),
    (16, "reservoir_ei", "neuro", "arXiv 2504.12480 (2025)",
     "Boosting Reservoir Computing with Brain-inspired Adaptive Dynamics"),
    (17, "talking_heads", "circuits", "arXiv 2406.09519 (2024)",
     "Talking Heads: Understanding Inter-layer Communication in Transformer Language Models"),
    (18, "austeer", "steering", "arXiv 2602.04428 (2026)",
     "Fine-Grained Activation Steering: Steering Less, Achieving More"),
    (19, "imu_video", "body", "arXiv 2507.13482 (2025)",
     "Improving Out-of-distribution Human Activity Recognition via IMU-Video Cross-modal "
     "Representation Learning"),
    (20, "guiding_giants", "steering", "arXiv 2505.20309 (2025)",
     "Guiding Giants: Lightweight Controllers for Weighted Activation Steering in LLMs"),
    (21, "neurofeedback", "introspection", "arXiv 2505.13763 (2025)",
     "Language Models Are Capable of Metacognitive Monitoring and Control of Their Internal Activations"),
    (22, "outliertune", "compression", "arXiv 2406.18832 (2024)",
     "OutlierTune: Efficient Channel-Wise Quantization for Large Language Models"),
    (23, "adadim", "compression", "arXiv 2309.15531 (2023)",
     "Rethinking Channel Dimensions to Isolate Outliers for Low-bit Weight Quantization of "
     "Large Language Models"),
    (24, "winner", "architectures", "arXiv 2509.09719 (2025)",
     "Spectral Bottleneck in Deep Neural Networks: Noise is All You Need (WINNER, SIREN²)"),
    (25, "induction_clamp", "circuits", "arXiv 2404.07129 (2024)",
     "What needs to go right for an induction head? A mechanistic study of in-context learning "
     "circuits and their formation"),
    (26, "awq", "compression", "arXiv 2306.00978 (2023)",
     "AWQ: Activation-aware Weight Quantization for LLM Compression and Acceleration"),
    (27, "introspection", "introspection", "Transformer Circuits (2025)",
     "Emergent Introspective Awareness in Large Language Models (concept injection)"),
    (28, "massive_activations", "circuits", "arXiv 2508.03616 (2025)",
     "Hidden Dynamics of Massive Activations in Transformer Training"),
    (29, "tangent_arithmetic", "adaptation", "arXiv 2305.12827 (2023)",
     "Task Arithmetic in the Tangent Space: Improved Editing of Pre-Trained Models"),
    (30, "internal_consistency", "introspection", "arXiv 2405.18711 (2024)",
     "Calibrating Reasoning in Language Models with Internal Consistency"),
    (31, "atoms", "circuits", "arXiv 2509.20784 (2025)",
     "Towards Atoms of Large Language Models"),
    (32, "imdy", "body", "arXiv 2410.17610 (2024)",
     "ImDy: Human Inverse Dynamics from Imitated Observations"),
    (33, "repe_reasoning", "steering", "arXiv 2504.19483 (2025)",
     "Improving Reasoning Performance in Large Language Models via Representation Engineering"),
    (34, "lift", "adaptation", "arXiv 2506.00772 (2025)",
     "LIFT the Veil for the Truth: Principal Weights Emerge after Rank Reduction for "
     "Reasoning-Focused Supervised Fine-Tuning"),
    (35, "wearable_ssl", "body", "arXiv 2312.05409 (2023)",
     "Large-scale Training of Foundation Models for Wearable Biosignals"),
    (36, "fitness_bilstm", "body", "arXiv 2411.11548 (2024)",
     "Real-Time Fitness Exercise Classification and Counting from Video Frames"),
    (37, "sparsing_law", "compression", "arXiv 2411.02335 (2024)",
     "Sparsing Law: Towards Large Language Models with Greater Activation Sparsity"),
    (38, "self_feedback", "introspection", "arXiv 2407.14507 (2024)",
     "Internal Consistency and Self-Feedback in Large Language Models: A Survey"),
    (39, "loss_curvature", "circuits", "arXiv 2510.24256 (2025)",
     "From Memorization to Reasoning in the Spectrum of Loss Curvature"),
    (40, "feature_neurons", "introspection", "arXiv 2501.02688 (2025)",
     "Decoding specialised feature neurons in LLMs with the final projection layer"),
    (41, "homeostatic", "neuro", "arXiv 2205.08645 (2022)",
     "Need is All You Need: Homeostatic Neural Networks Adapt to Concept Shift"),
    (42, "statmech_continual", "neuro", "arXiv 2212.02846 (2022)",
     "Statistical mechanics of continual learning: variational principle and mean-field potential"),
    (43, "self_interpretability", "introspection", "arXiv 2505.17120 (2025)",
     "Self-Interpretability: LLMs Can Describe Complex Internal Processes that Drive Their "
     "Decisions, and Improve with Training"),
    (44, "kat", "architectures", "arXiv 2409.10594 (2024)",
     "Kolmogorov-Arnold Transformer (KAT, GR-KAN)"),
    (45, "bi_induct", "circuits", "arXiv 2509.22947 (2025)",
     "Induction Signatures Are Not Enough: A Matched-Compute Study of Load-Bearing Structure in "
     "In-Context Learning"),
)
# fmt: on

SYSTEMS: tuple[System, ...] = tuple(
    System(number=number, slug=slug, family=family, title=title, paper=paper)
    for number, slug, family, paper, title in _TABLE
)

WORLDS: tuple[System, ...] = (
    System(number=0, slug="tales", family="worlds", title="tales: a language world and its models", paper="mechlab"),
)
"""Experiments that make subjects for the others; they are no papers and have no number."""
