"""What is measured of state space models; each import declares the benchmarks of one study."""

from __future__ import annotations

from medarch.ssm import study_delay as study_delay  # declares ssm/delay
from medarch.ssm import study_linear_forms as study_linear_forms  # declares ssm/linear-forms
from medarch.ssm import study_speed as study_speed  # declares ssm/scan-speed
from medarch.ssm import study_ssd as study_ssd  # declares ssm/ssd-speed
