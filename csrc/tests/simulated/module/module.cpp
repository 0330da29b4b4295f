// simulator_tests: the simulator for pytest.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include "device/sim/settings.h"
#include "probes.h"
#if defined(GPT2FAST_CUTE)
#include "layouts.h"
#endif

namespace py = pybind11;
using namespace gpt2fast;

PYBIND11_MODULE(simulator_tests, module) {
    py::register_exception<simulator::Error>(module, "Error", PyExc_RuntimeError);

    module.def(
        "use_settings",
        [](const std::string& order, uint64_t seed, const std::string& async) {
            simulator::use_settings(simulator::Settings{simulator::parse_order(order), seed,
                                                        simulator::parse_arrival(async)});
        },
        py::arg("order") = "fifo", py::arg("seed") = 0, py::arg("async_copies") = "deferred");
    module.def("use_environment", [] { simulator::use_settings(std::nullopt); });
    module.def("reset_statistics", simulator::reset_statistics);
    module.def("statistics", [] {
        const simulator::Statistics counted = simulator::statistics();
        return std::map<std::string, uint64_t>{
            {"launches", counted.launches},
            {"blocks", counted.blocks},
            {"switches", counted.switches},
            {"async_bytes", counted.async_bytes},
            {"mma", counted.mma},
            {"wgmma", counted.wgmma},
            {"ldmatrix", counted.ldmatrix},
            {"ldmatrix_matrices", counted.ldmatrix_matrices},
            {"ldmatrix_passes", counted.ldmatrix_passes},
        };
    });

    module.def("shuffle", simulated::shuffle, py::arg("kind"), py::arg("values"),
               py::arg("argument"), py::arg("width") = 32, py::arg("mask") = ~0u);
    module.def("votes", simulated::votes);
    module.def("ldmatrix", simulated::ldmatrix, py::arg("starts"), py::arg("matrices") = 4,
               py::arg("transposed") = false);
    module.def("copy_async", simulated::copy_async);
    module.def("tma_box", simulated::tma_box);
    module.def("ping_pong", simulated::ping_pong);
    module.def("atomics", simulated::atomics);
    module.def("last_block_sums", simulated::last_block_sums);
    module.def("order_of_threads", simulated::order_of_threads);
    module.def("fail_in_thread", simulated::fail_in_thread);
    module.def("line_of_failure", simulated::line_of_failure);
    module.def("deadlock", simulated::deadlock);
    module.def("concurrent_sums", simulated::concurrent_sums,
               py::call_guard<py::gil_scoped_release>());
    module.def("approximations", simulated::approximations);
#if defined(GPT2FAST_CUTE)
    module.def("layout_mismatches", simulated::layout_mismatches);
#endif
}
