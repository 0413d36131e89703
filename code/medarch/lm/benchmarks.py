"""What is measured of the language models; each import declares the benchmarks of one study."""

from __future__ import annotations

from medarch.lm import study_architectures as study_architectures  # declares lm/architecture-spread
from medarch.lm import study_attention_ratio as study_attention_ratio  # declares lm/attention-ratio
from medarch.lm import study_decoding as study_decoding  # declares lm/decoding
from medarch.lm import study_four as study_four  # declares lm/four-checkpoints
from medarch.lm import study_instructions as study_instructions  # declares lm/instruction-tuning
from medarch.lm import study_mamba_step as study_mamba_step  # declares lm/mamba-step
from medarch.lm import study_recall as study_recall  # declares lm/recall-tasks
from medarch.lm import study_routers as study_routers  # declares lm/router-access
from medarch.lm import study_scaling as study_scaling  # declares lm/scaling
from medarch.lm import study_specialisation as study_specialisation  # declares lm/specialisation
from medarch.lm import study_spread as study_spread  # declares lm/checkpoint-spread
from medarch.lm import study_step as study_step  # declares lm/training-step
from medarch.lm import study_streaming as study_streaming  # declares lm/streaming
from medarch.lm import study_training as study_training  # declares lm/moe-training
from medarch.lm import study_vital_signs as study_vital_signs  # declares lm/vital-signs
