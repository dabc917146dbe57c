"""Options of scheduler configs and their defaults in diffusers, by what they are about."""

from __future__ import annotations

from typing import Any

TRAINING: dict[str, Any] = {
    "num_train_timesteps": 1000,
    "beta_start": 0.0001,
    "beta_end": 0.02,
    "beta_schedule": "linear",
    "trained_betas": None,
    "prediction_type": "epsilon",
    "steps_offset": 0,
}
DISCRETE = TRAINING | {"timestep_spacing": "leading"}
CLIPPING = {"clip_sample": True, "clip_sample_range": 1.0}
THRESHOLDING = {"thresholding": False, "dynamic_thresholding_ratio": 0.995, "sample_max_value": 1.0}
ZERO_SNR = {"rescale_betas_zero_snr": False}
SPACED = {"use_karras_sigmas": False, "use_exponential_sigmas": False, "use_beta_sigmas": False}
RESPACED = SPACED | {"sigma_min": None, "sigma_max": None}
SIGMAS = TRAINING | RESPACED | {"timestep_spacing": "linspace"}
OLD_BETAS = {"beta_start": 0.00085, "beta_end": 0.012}
DISTILLED = (
    DISCRETE
    | CLIPPING
    | THRESHOLDING
    | ZERO_SNR
    | OLD_BETAS
    | {
        "beta_schedule": "scaled_linear",
        "clip_sample": False,
        "original_inference_steps": 50,
        "timestep_scaling": 10.0,
    }
)
VIDEO = (
    DISCRETE
    | ZERO_SNR
    | OLD_BETAS
    | {"beta_schedule": "scaled_linear", "set_alpha_to_one": True, "snr_shift_scale": 3.0}
)
SOLVER = (
    SIGMAS
    | THRESHOLDING
    | {
        "solver_order": 2,
        "lower_order_final": True,
        "use_flow_sigmas": False,
        "flow_shift": 1.0,
        "use_dynamic_shifting": False,
        "time_shift_type": "exponential",
    }
)
DPM = SOLVER | {
    "algorithm_type": "dpmsolver++",
    "solver_type": "midpoint",
    "final_sigmas_type": "zero",
    "lambda_min_clipped": -float("inf"),
    "variance_type": None,
}
EDM = {
    "num_train_timesteps": 1000,
    "sigma_min": 0.002,
    "sigma_max": 80.0,
    "sigma_data": 0.5,
    "sigma_schedule": "karras",
    "prediction_type": "epsilon",
    "rho": 7.0,
    "final_sigmas_type": "zero",
}
FLOW = RESPACED | {
    "num_train_timesteps": 1000,
    "shift": 1.0,
    "use_dynamic_shifting": False,
    "invert_sigmas": False,
    "shift_terminal": None,
    "time_shift_type": "exponential",
}
CONSISTENCY = {
    "num_train_timesteps": 40,
    "sigma_min": 0.002,
    "sigma_max": 80.0,
    "sigma_data": 0.5,
    "s_noise": 1.0,
    "rho": 7.0,
    "clip_denoised": True,
}
