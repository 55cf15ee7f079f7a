"""What a Megatron rank is made of: process groups, model, batches, schedules, optimizer, LoRA and checkpoints."""
