"""Mathematical answers: equality, the canonical form, and the processes that judge untrusted text."""
