"""HTML pages of rollouts: drift, gate weights and the teacher's log-probabilities of each token."""

from opdlab.viewer.page import INDEX, RolloutText, page_name, render_index, render_page, write_page
from opdlab.viewer.page_summary import PageSummary, step_count
from opdlab.viewer.rollouts import ShownRollout, choose_rollouts
from opdlab.viewer.text import markdown_literal, visible
from opdlab.viewer.token_colors import ColorScale, Quantity, color_scale, quantities
from opdlab.viewer.tokens import token_texts

__all__ = [
    "INDEX",
    "ColorScale",
    "Quantity",
    "PageSummary",
    "RolloutText",
    "ShownRollout",
    "choose_rollouts",
    "color_scale",
    "markdown_literal",
    "page_name",
    "quantities",
    "render_index",
    "render_page",
    "step_count",
    "token_texts",
    "visible",
    "write_page",
]
