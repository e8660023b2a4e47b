"""trl's settings for a recipe and a placement."""

from __future__ import annotations

from dataclasses import fields
from pathlib import Path

from trl import SFTConfig

from tuning.plan import Placement, Recipe


def sft_config(
    recipe: Recipe, placement: Placement, run: Path, *, by_offsets: bool = False
) -> SFTConfig:
    """trl's settings for this recipe and placement; fp16 autocast is `trainer.Exact`'s own.

    Attention `by_offsets` needs no padding: rows of a micro-batch are concatenated. Not with
    NEFTune, whose noise depends on the length of a row.
    """
    padding_free = recipe.packing or (by_offsets and recipe.neftune_alpha is None)
    known = {field.name for field in fields(SFTConfig)}
    checkpointing = "activation_checkpointing"
    if checkpointing not in known:  # transformers before 5.18
        checkpointing = "gradient_checkpointing"
    return SFTConfig(
        output_dir=str(run),
        use_cpu=placement.device == "cpu",
        bf16=recipe.precision == "bfloat16",
        fp16=False,
        seed=recipe.seed,
        data_seed=recipe.seed,
        max_steps=recipe.steps,
        num_train_epochs=recipe.epochs,
        per_device_train_batch_size=placement.micro_batch,
        per_device_eval_batch_size=placement.micro_batch,
        gradient_accumulation_steps=placement.accumulation,
        learning_rate=recipe.learning_rate,
        lr_scheduler_type=recipe.schedule,
        lr_scheduler_kwargs=_schedule_options(recipe),
        warmup_steps=recipe.warmup_steps,
        optim=recipe.optimizer,
        weight_decay=recipe.weight_decay,
        adam_beta1=recipe.betas[0],
        adam_beta2=recipe.betas[1],
        adam_epsilon=recipe.epsilon,
        ddp_find_unused_parameters=False,  # fillers go through the whole model, too
        ddp_broadcast_buffers=False,  # no buffer of these models changes
        router_aux_loss_coef=0.0,  # routers are frozen; dense classes know the option as well
        max_grad_norm=recipe.max_grad_norm,
        neftune_noise_alpha=recipe.neftune_alpha,
        train_sampling_strategy="random" if recipe.shuffle else "sequential",
        packing=recipe.packing,
        packing_strategy="bfd",
        padding_free=padding_free,
        max_length=recipe.max_length if recipe.packing else None,
        dataset_kwargs={"skip_prepare_dataset": True},
        dataloader_pin_memory=placement.device == "cuda",
        accelerator_config={"non_blocking": placement.device == "cuda"},
        logging_steps=1,
        logging_nan_inf_filter=False,
        report_to="none",
        disable_tqdm=True,
        save_strategy="no",
        eval_strategy="steps" if recipe.eval_steps else "no",
        eval_steps=recipe.eval_steps,
        **{checkpointing: placement.checkpointing},
    )


def _schedule_options(recipe: Recipe) -> dict[str, float]:
    """transformers ends a polynomial at 1e-7, and refuses a learning rate below that."""
    low = recipe.schedule == "polynomial" and recipe.learning_rate <= 1e-7
    return {"lr_end": 0.0} if low else {}
