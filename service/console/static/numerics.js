// Softmax and cross-entropy as in model/numerics.py: float64, from logits, after subtracting the largest one.

/** Return every step from logits to the loss of class y, and its gradient; arrays have one number per class. */
export function worked(logits, y, temperature) {
  const z = logits.map((one) => one / temperature);
  const max = Math.max(...z);
  const shifted = z.map((one) => one - max);
  const exponentials = shifted.map(Math.exp);
  const sum = exponentials.reduce((a, b) => a + b, 0);
  const p = exponentials.map((one) => one / sum);
  const logSum = Math.log(sum);
  const logP = shifted.map((one) => one - logSum);
  const entropy = -p.reduce((total, one, k) => total + (one > 0 ? one * logP[k] : 0), 0);
  return { z, max, shifted, exponentials, sum, p, logP, loss: 0 - logP[y], gradient: p.map((one, k) => one - (k === y ? 1 : 0)), entropy: entropy + 0 };
}

export const softmax = (logits) => worked(logits, 0, 1).p;

/** Return softmax without subtracting the largest logit: infinity divided by infinity for large numbers. */
export function naive(logits, temperature) {
  const exponentials = logits.map((one) => Math.exp(one / temperature));
  const sum = exponentials.reduce((a, b) => a + b, 0);
  return exponentials.map((one) => one / sum);
}
