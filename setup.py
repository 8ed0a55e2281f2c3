from setuptools import find_packages, setup

# Two things that ris_d2 needs are missing from install_requires on purpose; ris_d2/_dependencies.py
# says how to get them where they are absent:
# - detectron2 is not on PyPI under its own name, and an install from its sources, conda-forge or
#   tools/install_detectron2.py must all do.
# - OpenCV is one module from several distributions (opencv-python, -headless, ...). To name one
# would
#   put a second copy of cv2 beside the other, and opencv-python does not even import without libGL.
setup(
    name="ris_d2",
    version="0.1.0",
    description="Referring image segmentation for detectron2",
    license="Apache-2.0",
    license_files=["LICENSE"],
    python_requires=">=3.10",
    packages=find_packages(include=["ris_d2", "ris_d2.*"]),
    package_data={
        # configs is a link to the recipes of the checkout.
        "ris_d2": ["py.typed", "*.yaml", "*.md", "configs/*.yaml", "configs/*/*.yaml"],
        "ris_d2.data": ["*.json"],
        "ris_d2.example": ["*.yaml", "*.md", "*.png", "*.safetensors", "tokenizer/*"],
    },
    entry_points={"console_scripts": ["ris_d2 = ris_d2.__main__:main"]},
    install_requires=[
        # Earlier ones run code or damage memory while they read a hostile checkpoint, even with
        # weights_only=True: CVE-2025-32434 (before 2.6), CVE-2026-24747 (before 2.10).
        "torch>=2.10",
        "numpy",
        "Pillow",
        "PyYAML",
        "pycocotools>=2.0.2",
        "fvcore",
        "huggingface_hub",
        "matplotlib",
        "safetensors",
        "scipy",
        "tabulate",
        "tqdm",
        "timm>=1.0",
        "tokenizers",
        "torchvision",
        "transformers>=5",  # layers of earlier ones return tuples
    ],
    extras_require={
        "opencv": ["opencv-python-headless"],
        "beit3": ["sentencepiece"],  # reads beit3.spm; a tokenizer.json does without
        "analysis": ["scikit-learn"],  # t-SNE of tools/attention/main.py
        "supervision": ["supervision"],  # Results.to_supervision
        "export": ["onnx", "onnxruntime", "onnxscript"],  # tools/export.py; about 110 MB
        "web": ["gradio>=6"],  # tools/webdemo.py; it keeps Pillow below 13
        "dev": ["pytest", "onnx", "onnxruntime", "onnxscript"],
    },
)
