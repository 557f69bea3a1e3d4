"""HTML pages of rollouts: drift, gate weights and the teacher's log-probabilities of each token."""

from opdlab.viewer.page import INDEX, RolloutText, drop_pages_after, page_name, render_page, write_page
from opdlab.viewer.rollouts import ShownRollout, choose_rollouts
from opdlab.viewer.text import markdown_literal, token_texts, visible
from opdlab.viewer.token_colors import color_scale, quantities

__all__ = [
    "INDEX",
    "RolloutText",
    "ShownRollout",
    "choose_rollouts",
    "color_scale",
    "drop_pages_after",
    "markdown_literal",
    "page_name",
    "quantities",
    "render_page",
    "token_texts",
    "visible",
    "write_page",
]
