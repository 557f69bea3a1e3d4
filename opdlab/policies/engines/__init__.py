"""Samplers that are engines of their own: vLLM in this process and vLLM on servers."""
