#include <stddef.h>

/* Run task(context, index) for each index below count, on up to `threads` threads of which the
 * caller is one. The order of the indices is not fixed. Returns when all have run.
 *
 * With one thread, and where another caller is using the pool, the caller runs all of them. A
 * process made by fork starts a pool of its own. */
void pool_run(void (*task)(void *context, ptrdiff_t index), void *context, ptrdiff_t count,
              int threads);
