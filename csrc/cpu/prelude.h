// Headers that the kernels need. Included before an instruction set is switched on, so that
// no inline function of the standard library is compiled for it and then linked in elsewhere.
#pragma once

#include <algorithm>
#include <array>
#include <cmath>
#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <limits>
#include <new>
#include <type_traits>
#include <utility>

#include "../common/gelu.h"
#include "../common/philox.h"
#include "kernels.h"
#include "step.h"
#include "team.h"
