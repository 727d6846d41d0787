"""What drives chains, apart from driving them."""

import subprocess
import sys


def test_a_trial_imports_no_torch():
    """Nor does what Ray imports for it; the import law looks at our own modules alone."""
    code = "import sys, ray.tune, dmsae_ray.distill.trials; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0
