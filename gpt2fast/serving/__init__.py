"""The HTTP server: OpenAI's protocol for one model. `gpt2fast serve` runs it.

`app.create_app` makes the ASGI application of a Generator; everything else here is a part of it:

- `parameters`, `fields`: what requests hold, checked; `openapi`: the same, described;
- `completions`, `chat`, `embeddings`, `tokens`, `status`: the endpoints;
- `planning`, `submission`, `choices`, `streaming`: from a request to jobs of the engine, and from
  the engine's events to answers;
- `gateway`, `connections`, `body`, `limits`: who is let in, how much, for how long;
- `logs`, `metrics`: what is told about it; `process`: the server as a process that drains.
"""
