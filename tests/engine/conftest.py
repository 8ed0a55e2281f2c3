import sys
from pathlib import Path

# Helper modules of these tests, and train_net.py.
sys.path[:0] = [str(Path(__file__).parent), str(Path(__file__).parents[2])]
