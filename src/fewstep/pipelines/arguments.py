"""What the arguments of pipelines mean, said once; and the answer to a misspelt one."""

from __future__ import annotations

import difflib

MEANINGS = {
    "prompt": "Text, or one text per picture. Needed unless prompt_embeds is given.",
    "prompt_2": "Text for SDXL's second text encoder; by default it reads prompt.",
    "image": "The picture to start from, or one per prompt: PIL, numpy (H, W, 3) or tensor "
    "(3, H, W), floats in [0, 1] or [-1, 1], or latents. Its sides are floored to what the VAE "
    "can hold.",
    "mask_image": "What to draw anew: white (at least 0.5) is repainted, black stays. One mask, or "
    "one per prompt.",
    "masked_image_latents": "Latents of the picture with its white part grey, in place of those "
    "made from image and mask_image.",
    "padding_mask_crop": "A margin in pixels: work on the surroundings of the mask alone, at full "
    "size, and paste them back. Needs PIL pictures.",
    "mask_blur": "Radius in pixels by which the edge of what is pasted back is softened, inwards.",
    "paste_back": "Put the pixels outside the mask back exactly as they were (the VAE changes them "
    "a little otherwise). Needs PIL pictures.",
    "strength": "In (0, 1]: how much of the picture is replaced; 1 keeps next to nothing of it.",
    "height": "Height in pixels, a multiple of the VAE's factor (8 in Stable Diffusion); by "
    "default what the UNet was trained for.",
    "width": "Width in pixels, like height.",
    "num_inference_steps": "Number of steps; more take longer.",
    "original_inference_steps": "Steps of the grid that the LCM was distilled on, of which "
    "num_inference_steps are taken; by default the scheduler's, 50.",
    "lcm_origin_steps": "An older name of original_inference_steps.",
    "timesteps": "The times to step through, descending, in place of num_inference_steps.",
    "denoising_start": "In (0, 1): begin at this part of the run, with image holding the latents "
    "that another model has left there; strength is not read then.",
    "denoising_end": "In (0, 1): stop at this part of the run, for another model to go on.",
    "sigmas": "Not supported; give timesteps.",
    "guidance_scale": "How strongly the text steers. With a guidance-distilled LCM an input of the "
    "network, 3 to 13; otherwise 1 is off and each step costs twice as much above 1.",
    "guidance_rescale": "In [0, 1]: pulls guided contrast back to the unguided (Lin et al. 2024).",
    "negative_prompt": "What to steer away from, one text or one per prompt. Without guidance by "
    "two network calls (an LCM, or guidance_scale <= 1) it has no effect, and a warning says so.",
    "negative_prompt_2": "The negative prompt for SDXL's second text encoder; by default "
    "negative_prompt.",
    "num_images_per_prompt": "Pictures per prompt.",
    "num_frames": "Frames of the video; more than the motion modules know are made in windows.",
    "num_videos_per_prompt": "Videos per prompt.",
    "decode_chunk_size": "Frames that the VAE decodes at a time; fewer take less memory.",
    "context_length": "Frames that the network sees at a time; by default, and at most, those that "
    "the motion modules know.",
    "context_overlap": "Frames that one such window shares with the next, where they are blended.",
    "eta": "In [0, 1]: fresh noise per step of the DDIM and TCD schedulers; 0 draws none.",
    "generator": "torch.Generator for all noise, or one per picture: each picture is then what it "
    "would be alone.",
    "latents": "The start, (pictures, channels, height, width) in latent pixels, in place of drawn "
    "noise.",
    "prompt_embeds": "Embedded prompts (prompts, tokens, channels), in place of prompt.",
    "negative_prompt_embeds": "Embedded negative prompts, shaped as prompt_embeds.",
    "pooled_prompt_embeds": "Each prompt as a whole (prompts, channels), SDXL's.",
    "negative_pooled_prompt_embeds": "Shaped as pooled_prompt_embeds.",
    "original_size": "(height, width) that SDXL is told the picture had; by default its size.",
    "crops_coords_top_left": "(top, left) that SDXL is told the picture was cropped at.",
    "target_size": "(height, width) that SDXL is told to aim at; by default the picture's size.",
    "negative_original_size": "original_size for the negative prompt.",
    "negative_crops_coords_top_left": "crops_coords_top_left for the negative prompt.",
    "negative_target_size": "target_size for the negative prompt.",
    "aesthetic_score": "The score that an SDXL refiner is told.",
    "negative_aesthetic_score": "aesthetic_score for the negative prompt.",
    "control_image": "What steers the ControlNet: a picture, one per prompt, or a list of these "
    "for several ControlNets.",
    "controlnet_conditioning_scale": "How strongly each ControlNet steers; a number, or a list.",
    "guess_mode": "Let the ControlNet steer without text: only the prompt's half is controlled.",
    "control_guidance_start": "In [0, 1): part of the run at which each ControlNet sets in.",
    "control_guidance_end": "In (0, 1]: part of the run at which each ControlNet stops.",
    "adapter_conditioning_scale": "How strongly each T2I-Adapter steers; a number, or a list.",
    "adapter_conditioning_factor": "In [0, 1]: the first part of the run, that it steers.",
    "ip_adapter_image": "A picture as a prompt, for an IP-Adapter; one for each if there are "
    "several, and a list within the list for several pictures for one adapter.",
    "ip_adapter_image_embeds": "What prepare_ip_adapter_image_embeds returned, in place of "
    "ip_adapter_image; with guidance the negative half comes first.",
    "weighted_prompt": "Read (word:1.3), (word), [word] and BREAK in prompts as weights and "
    "breaks, and prompts of any length, in chunks.",
    "output_type": '"pil", "np" (B, H, W, 3) and "pt" (B, 3, H, W) in [0, 1], or "latent".',
    "return_dict": "Return an output with names; if False a tuple (images, None).",
    "cross_attention_kwargs": '{"scale": s} multiplies all LoRAs for this call.',
    "clip_skip": "Number of last layers of the text encoder to leave out.",
    "callback_on_step_end": "Called as callback(pipe, index, timestep, tensors) after each step; "
    "returns the tensors it wants changed. pipe._interrupt = True ends the loop there.",
    "callback_on_step_end_tensor_inputs": "Which tensors it sees: latents, denoised, "
    "prompt_embeds, negative_prompt_embeds, w_embedding.",
}
# Names that come from other programs -> what is called so here.
ELSEWHERE = {
    "seed": "generator=torch.Generator().manual_seed(seed)",
    "steps": "num_inference_steps",
    "num_steps": "num_inference_steps",
    "cfg_scale": "guidance_scale",
    "callback": "callback_on_step_end",
    "callback_steps": "callback_on_step_end",
    "denoising_strength": "strength",
    "n": "num_images_per_prompt",
    "prompt_weighting": "weighted_prompt",
}


def hint(name: str, names: list[str]) -> str:
    """What an unknown argument may have been meant for."""
    near = difflib.get_close_matches(name, names, n=1)
    if meant := ELSEWHERE.get(name) or (near[0] if near else None):
        return f"; did you mean {meant}?"
    return f" (known: {', '.join(names)})"
