#ifndef SPECTOOL_TYPES_H
#define SPECTOOL_TYPES_H

enum type { FLOAT, BFLOAT16, HALF };

#endif
