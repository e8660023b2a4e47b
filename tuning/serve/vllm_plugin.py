"""The vLLM plugin `tuning_lora_images`: the model of a request may be an adapter image.

vLLM loads plugins in each of its processes, and imports this module whether or not it is used: so
everything else is imported once TUNING_LORA_IMAGES is set. docs/serve.md says what to set.
"""

from __future__ import annotations

import asyncio
import logging
import os

NAME = "tuning_lora_images"
# Below vLLM's own logger, whose handlers and levels are the ones its users know.
log = logging.getLogger(f"vllm.{NAME}")


def register() -> None:
    """Register the resolver if TUNING_LORA_IMAGES is set. Errors are logged, not raised."""
    if not os.environ.get("TUNING_LORA_IMAGES", "").strip():
        return
    try:
        _register()
    except Exception as error:  # vLLM would not start
        log.error("No adapter images are served (TUNING_LORA_IMAGES): %s", error)


def _register() -> None:
    from vllm.lora.request import LoRARequest
    from vllm.lora.resolver import LoRAResolver, LoRAResolverRegistry

    from tuning.errors import TuningError
    from tuning.serve.lora_images import LoraImages

    class ImageResolver(LoRAResolver):  # type: ignore[misc]  # vLLM is not installed here
        """Resolves image references under the prefixes to adapters in the cache."""

        def __init__(self, images: LoraImages) -> None:
            self.images = images

        async def resolve_lora(self, base_model_name: str, lora_name: str) -> LoRARequest | None:
            """The adapter image `lora_name`, or None, for which vLLM answers 404."""
            if not self.images.allows(lora_name):
                return None
            try:
                digest, folder = await asyncio.to_thread(
                    self.images.fetch, lora_name, base_model_name
                )
            except (TuningError, OSError) as error:
                log.warning("The adapter image %s is not served: %s", lora_name, error)
                return None
            number = int(digest.rpartition(":")[2][:7], 16) + 1  # below 2^31 and above 0
            return LoRARequest(lora_name=lora_name, lora_int_id=number, lora_path=str(folder))

    images = LoraImages.from_environment(os.environ)
    if images is None or NAME in LoRAResolverRegistry.get_supported_resolvers():
        return
    LoRAResolverRegistry.register_resolver(NAME, ImageResolver(images))
    log.info("Adapter images are served from %s", ", ".join(images.prefixes))
    switch = "VLLM_ALLOW_RUNTIME_LORA_UPDATING"
    if os.environ.get(switch, "").strip().lower() not in ("1", "true"):
        log.warning("TUNING_LORA_IMAGES has no effect without %s=true", switch)
