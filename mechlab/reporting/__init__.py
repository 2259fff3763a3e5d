"""From measured numbers to something readable: metrics and judged claims, figures, progress, the gallery."""

from mechlab.reporting.figures import arm_bars, curve_band, heat_map, histogram, trade_off
from mechlab.reporting.figures import save as save_figure
from mechlab.reporting.gallery import build_gallery
from mechlab.reporting.log import Log
from mechlab.reporting.model_figures import depth_curves, head_maps
from mechlab.reporting.results import (
    Claim,
    ClaimResult,
    Metric,
    Result,
    judge_claims,
    read_record,
    to_record,
    validate,
    write_json,
)

__all__ = [
    "Claim",
    "ClaimResult",
    "Log",
    "Metric",
    "Result",
    "arm_bars",
    "build_gallery",
    "curve_band",
    "depth_curves",
    "head_maps",
    "heat_map",
    "histogram",
    "judge_claims",
    "read_record",
    "save_figure",
    "to_record",
    "trade_off",
    "validate",
    "write_json",
]
