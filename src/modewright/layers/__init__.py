# SPDX-License-Identifier: Apache-2.0
"""What a plain layer is to an algorithm: a matrix, the rows it multiplies, the part it plays.

``matrices`` (weights as ``[out, in]``, inputs as rows), ``experts`` (fused ones), ``roles``
(routers, shared and offloaded weights), ``masks`` (weights that are held at zero).
"""
