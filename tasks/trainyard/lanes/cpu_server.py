"""vLLM's server with a garbage collector that does not get in the way of its imports.

    python -m trainyard.lanes.cpu_server [arguments of vLLM's API server]

vLLM imports some six thousand modules in each of its two processes. Collecting garbage after every
700 new objects, as Python does by default, costs a sixth of that time and finds nothing.
"""

from __future__ import annotations

import gc

# At import, because vLLM's second process imports this module too, before anything else.
gc.set_threshold(50_000, 20, 20)


def main() -> None:
    """Run vLLM's API server with the arguments of this process."""
    from vllm.entrypoints.launchers.api_server.entry import main as serve

    serve()


if __name__ == "__main__":
    main()
