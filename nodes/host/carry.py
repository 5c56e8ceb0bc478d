"""What nodes before ours have set on a model, put onto the model that we make of it."""


def keep_sampling_patches(model, onto):
    """What sampling nodes have set (ModelSamplingFlux, attention patches, wrappers) stays in force."""
    twin = model.clone()
    onto.model_options = twin.model_options
    onto.object_patches = {k: v for k, v in twin.object_patches.items() if not k.startswith("diffusion_model.")}
    onto.wrappers, onto.callbacks = twin.wrappers, twin.callbacks
