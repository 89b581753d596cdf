// The JSON value type of the project (Boost.JSON) under one name.

#pragma once

#include <boost/json/array.hpp>
#include <boost/json/object.hpp>
#include <boost/json/serialize.hpp>
#include <boost/json/value.hpp>

namespace gantry {

namespace json = boost::json;

}  // namespace gantry
