"""Limits of what clients may ask for, and of the time that it may take."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Limits:
    """Limits of the server. Each is a flag of `gpt2fast serve`, whose help is the docstring."""

    max_body: int = 4 << 20
    """bytes of a request's body"""
    max_prompts: int = 128
    """texts in one request"""
    max_choices: int = 128
    """choices of one request: its texts times n or best_of"""
    max_prompt_tokens: int | None = None
    """tokens of a prompt (default: what the model can see)"""
    max_tokens: int | None = None
    """new tokens of a choice (default: what the model can see)"""
    max_logprobs: int = 20
    """alternatives named in the place of each token"""
    max_queue: int = 256
    """choices that wait for a place; further requests are answered 429"""
    max_connections: int = 512
    """connections at a time; further ones are answered 503"""
    request_timeout: float = 600.0
    """seconds after which an answer ends where it is"""
    header_timeout: float = 20.0
    """seconds for a connection's first or next request to arrive, headers and all"""
    body_timeout: float = 30.0
    """seconds for a request's body to arrive"""
    write_timeout: float = 30.0
    """seconds that a client may leave a part of an answer unread before its connection is cut"""
    max_unread: int = 4096
    """tokens that may wait for a client that reads slowly before its connection is cut"""
