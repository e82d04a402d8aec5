"""Every test runs on 8 virtual CPU devices, so that sharding is never switched off."""

import jax
import pytest

jax.config.update("jax_num_cpu_devices", 8)  # before the first use of a device


@pytest.fixture(scope="session")
def mesh():
    """All 8 devices on the fsdp axis."""
    from g4v_jax.sharding import make_mesh

    return make_mesh({"fsdp": -1})


@pytest.fixture
def one_device():
    """The mesh of `tiny`'s model: one device."""
    import tiny

    with jax.set_mesh(tiny.build().mesh):
        yield


@pytest.fixture(scope="session")
def model():
    """`tiny`'s model."""
    import tiny

    return tiny.build().model
