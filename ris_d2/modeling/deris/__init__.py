"""DeRIS: perception and cognition in loopback (Dai et al., ICCV 2025).

E expressions, Q queries, C channels. Between the parts go

- features of the perception branch, once per image: whatever ``PerceptionBranch.encode_images``
  gives;
- mask features f_m, once per expression: whatever ``PerceptionBranch.mask_features`` gives (f_m is
  a sum of a part per image and a small part per expression, and is never built per expression);
- rounds, a list of dicts, the last one final: "mask_logits" (E, Q, H/4, W/4), and "class_logits"
  (E, Q, 2), class 0 = referred. A round without cognition has no "class_logits": it is matched and
  supervised on masks alone;
- ``DeRISCriterion(rounds, existence_logits (E,), instance_masks, targets, names)`` -> {name:
  scalar}, where instance_masks are B tensors bool (N_i, H, W) at the input's size, targets B
  tensors bool (E_i, N_i), and names B strings for messages; scalars are weighted, means over all
  processes' samples.
"""

from .deris import DeRIS

__all__ = ["DeRIS"]
